import json
import os
from pathlib import Path

import pytest

from capdistill.metrics import ptb_tokenize

SHARED = Path(os.environ.get("CAPDISTILL_SHARED", Path(__file__).parents[3] / "shared"))
GOLDEN = SHARED / "golden" / "flickr8k_dev_ptb.json"

# Expected tokens: Stanford's PTBTokenizer 3.4.1 as the COCO tool runs it, read off its output.
RULES = {
    "contractions": (
        "I can't won't it's the dogs' dog's you'll they've I'd we're",
        "i ca n't wo n't it 's the dogs dog 's you 'll they 've i 'd we 're",
    ),
    "two words in one": (
        "cannot gonna gotta lemme gimme wanna 'tis 'twas wannabe cannot's",
        "can not gon na got ta lem me gim me wan na 't is 't was wannabe cannot 's",
    ),
    "apostrophes inside": (
        "rock 'n' roll o'clock ma'am O'Neil d'Orsay ol' 'em '90s '90 y'all c'mon",
        "rock 'n' roll o'clock ma'am o'neil d'orsay ol' 'em '90s '90 y' all c'mon",
    ),
    "quotes": ("\"x\" 'bb' “cc” ‘xx’ «e» ``f'' ‹g›", "x bb cc xx e f g"),
    "curly apostrophes": ("don’t it’s can‘t", "do n't it 's ca n`t"),
    "brackets": ("(a) [b] {c}", "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb-"),
    "punctuation": (
        "aa, b; c: dd. e! f? g ... h - i -- j … k – l — m",
        "aa b c dd e f g h i j k l m",
    ),
    "runs that stay": ("a ?! b !! c ----- d ** e", "a ?! b !! c ----- d ** e"),
    "abbreviations": (
        "Mr. Smith of St. Louis vs. the U.S. at 3 p.m. etc. in Washington D.C. by J. P. Moe Jr.",
        "mr. smith of st. louis vs. the u.s. at 3 p.m. etc. in washington d.c. by j. p. moe jr.",
    ),
    "words like abbreviations": (
        "it sat. The wash. in the mass. Mass. is a state. In Miss. no. No. 5",
        "it sat the wash in the mass mass. is a state in miss. no no. 5",
    ),
    "sentence after a letter": ("Point A. The dog", "point a the dog"),
    "numbers": (
        "1,000 3.14 .5 -5 +5 1/2 5:30 12/25/2010 1st 1990s 50% 5kg 5.5m",
        "1,000 3.14 .5 -5 +5 1/2 5:30 12/25/2010 1st 1990s 50 % 5kg 5.5 m",
    ),
    "one token with a space": ("3 1/2 cups", "3\u00a01/2 cups"),
    "fractions": ("½ 3½ ⅔", "1/2 3 1/2 2/3"),
    "currency": ("$5 US$5 £5 €5 ¢5 ¥5 #1", "$ 5 us$ 5 # 5 $ 5 cents 5 ¥ 5 # 1"),
    "hyphens": (
        "t-shirt black-and-white 2-year-old U.S.-based a- -b 5.5-inch",
        "t-shirt black-and-white 2-year-old u.s.-based a b 5.5-inch",
    ),
    "slashes": (
        "and/or w/o a/b/c/d black-white/red x/",
        "and/or w/o a/b/c / d black-white/red x /",
    ),
    "addresses": (
        "http://www.a.com/b?c=1 www.a.com a.com bob@a.com @user #tag #1",
        "http://www.a.com/b?c=1 www.a.com a.com bob@a.com @user #tag # 1",
    ),
    "missing spaces": ("dog.The cat,dog cat!dog", "dog.the cat dog cat!dog"),
    "mark-up": ("<b>bold</b> a < b R&amp;B &lt; A&W a&b", "<b> bold </b> a < b r&b < a&w a & b"),
    "faces": (":) :-( ;) =D ^_^ <3 :dog", ":-rrb- :--lrb- ;-rrb- =d ^_^ < 3 dog"),
    "emoji are dropped": ("dog 🐕 cat😀bird", "dog cat bird"),
    "other scripts": ("naïve café 狗在跑 Привет", "naïve café 狗在跑 привет"),
    "soft hyphen": ("soft\u00adhyphen", "softhyphen"),
}


@pytest.mark.parametrize("rule", RULES)
def test_tokens_are_those_of_the_coco_tool(rule: str) -> None:
    text, expected = RULES[rule]
    assert " ".join(ptb_tokenize(text)) == expected


@pytest.mark.parametrize(
    "x", ["\n", "\r", "\r\n", "\t", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"]
)
def test_any_white_space_separates_and_ends_no_caption(x: str) -> None:
    assert ptb_tokenize(f"a brown dog{x}runs .") == ["a", "brown", "dog", "runs"]


@pytest.mark.parametrize("text", ["", " ", "...", "! ? , - --", "\u2028", "😀"])
def test_text_without_words_gives_no_token(text: str) -> None:
    assert ptb_tokenize(text) == []


@pytest.mark.shared
@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden tokens are not beside the repository")
def test_all_golden_captions_are_tokenised_alike() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    pairs = [p for each in golden.values() for p in zip(each["raw"], each["ptb"], strict=True)]
    assert len(pairs) == 5000
    differing = [raw for raw, ptb in pairs if " ".join(ptb_tokenize(raw)) != ptb]
    assert differing == []
