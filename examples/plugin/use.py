"""Distil with a loss from an installed plugin, by its name alone."""

from __future__ import annotations

import capdistill as cd

print(cd.losses.describe("similarity"))

data = cd.data.sample()
tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
teacher = cd.Captioner.create("debug_teacher", tokenizer=tokenizer)
student = cd.Captioner.create("debug_student", tokenizer=tokenizer)

distiller = cd.Distiller(
    teacher,
    student,
    losses={"token": "token", "similarity": cd.losses.create("similarity", tau=0.2)},
    weights={"ce": 0.3, "token": 0.7, "similarity": 0.1},
)
distiller.fit(data.train, data.val, epochs=1, out="runs/similarity")
