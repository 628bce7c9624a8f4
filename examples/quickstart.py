"""Compose a teacher and a student, add your own loss, train, distil and caption a photo."""

from torch.nn.functional import cross_entropy

import capdistill as cd


@cd.losses.register("favourite")
class Favourite(cd.DistillationLoss):
    """Cross-entropy against the word that the teacher finds most likely."""

    def forward(self, student, teacher, batch):
        logits, targets = (out.logits[batch.target_mask].float() for out in (student, teacher))
        return cross_entropy(logits, targets.argmax(-1), reduction="sum")


data = cd.data.sample()  # or cd.data.Flickr8k("flickr8k"), with weights=True below
tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
encoder = cd.encoders.create("timm", name="test_vit", dim=128, weights=False, trainable="all")
decoder = cd.decoders.create("transformer", dim=128, width=128, layers=1, heads=4)
teacher = cd.Captioner(encoder, decoder, tokenizer)
encoder = cd.encoders.create("timm", name="test_efficientnet", dim=32, weights=False)
student = cd.Captioner(encoder, cd.decoders.create("lstm", dim=32, hidden=128), tokenizer)
options = {"epochs": 6, "batch_size": 8, "learning_rate": 2e-3, "encoder_lr_scale": 0.3}
cd.Trainer(teacher, **options).fit(data.train, data.val)
losses = {"token": cd.TokenKD(temperature=2.0), "favourite": "favourite"}
distiller = cd.Distiller(teacher, student, losses, {"favourite": 0.1}, **options)
distiller.fit(data.train, data.val, out="runs/quickstart", overwrite=True)
print(student.caption(data.val.examples[0].path), "|", data.val.captions[0])
