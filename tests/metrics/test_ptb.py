from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capdistill.errors import DataError
from capdistill.metrics import ptb, ptb_tokenize
from capdistill.metrics.ptb import Rule

# Expected tokens: Stanford's PTBTokenizer 3.4.1 (in Java) as the COCO tool runs it, read off its
# output.
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
    "clips that are no words": (
        "'n, one 'no.' ’no.5 ''s y’all c’mon s’mores ’tis ‘tis ’twas 'twasn't nor’easter",
        "n one no ’n o. 5 s y’ all c 'm on s 'm ores tis tis twas 't was n't nor easter",
    ),
    "curly names": (
        "o‘clock O’Brien D‘Artagnan L’Oréal Dunkin’ Donuts rock ’n’ roll ’em ’90s",
        "o‘clock o’brien d‘artagnan l’oréal dunkin’ donuts rock ’n’ roll ’em ’90s",
    ),
    "pairs of quotes": (
        "“‘a’” ‘‘a’’ ’” `‘x",
        "``` a ''' a ''' x",
    ),
    "n't in odd places": (
        "don't's inn't can't've I'dn't n't don‘t don`t don´t",
        "do n't 's inn t ca n't 've i d n't n't do n`t do n`t don ´ t",
    ),
    "a full stop before a break": (
        "5 kg., no., x_y.: a-b.; 5,5., A&W., word.,",
        "5 kg. no. x_y. a-b. 5,5 a&w. word.",
    ),
    "a letter before a sentence": (
        "X. He's X. He is A. THE J. Mr. Q. <b> x U.S. A Q. An, P. the",
        "x. he 's x he is a the j mr. q <b> x u.s. a q. an p. the",
    ),
    "abbreviations joined to words": (
        "etc.A etc.ab st.a inc.a fig.5 fig. 5 fig.  5 fig. a",
        "etc. a etc.ab st.a inc. a fig. 5 fig. 5 fig 5 fig a",
    ),
    "nations": (
        "non-U.S law U.S.-U.K x EU-U.S.",
        "non-u.s law u.s.-u.k x eu-u.s.",
    ),
    "prefixes and fixed words": (
        "pro- anti- pro-life C.D.s S&P-500 Cap'n c'est C++ F#",
        "pro- anti- pro-life c.d.s s&p-500 cap'n c'est c++ f#",
    ),
    "times and ratios": (
        "10:30am 5:30:20 :30 a:30 2010-12-25 12.25.2010 1.5-2.5",
        "10:30 am 5:30:20 :30 a :30 2010-12-25 12.25.2010 1.5-2 .5",
    ),
    "numbers over a space": (
        "(555) 555-1234 020 7946 0958 1 1/2 ft 2 men",
        "-lrb-555-rrb-\xa0555-1234 020\xa07946\xa00958 1\xa01/2 ft 2 men",
    ),
    "dots over a space": (
        "a . . .5 b . .5 ...5 ..5",
        "a 5 b .5 5 .5",
    ),
    "more faces": (
        ":*) :') (^_^) (-_-) X_X :{ :5 <:)",
        ":*-rrb- :'-rrb- -lrb-^_^-rrb- -lrb--_--rrb- x_x :{ :5 <:-rrb-",
    ),
    "entities": (
        "&quot;a&quot; dog&apos;s R&AMP;B &#39; caf&eacute; &nbsp; &hellip; &copy;",
        "a dog 's r&b &#39; caf&eacute; & hellip & copy",
    ),
    "addresses in odd places": (
        "http://a.b/c, www.a.com/foo.barbaz a.b@c.d, (x@y.z) a@b{c} 5.com",
        "http://a.b/c www.a.com/foo.barbaz a.b@c.d, -lrb- x@y.z -rrb- a@b -lcb- c -rcb- 5 com",
    ),
    "names of files": (
        "IMG_1234.JPG 1.jpg 1.jpg, 5a.6b.pdf a-b.jpg 1.jpgs",
        "img_1234 jpg 1.jpg 1.jpg 5a.6b.pdf a-b jpg 1 jpgs",
    ),
    "tags": (
        '<a href="x y"> < b> <b c=d> </b> <!-- x -->',
        '<a\xa0href="x\xa0y"> < b > < b c =d > </b> <!--\xa0x\xa0-->',
    ),
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


@pytest.mark.parametrize("x", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"])
def test_a_line_break_is_read_as_a_space(x: str) -> None:
    text = "3 1/2 cups. J. The no. 5 of it's <b c> (555) 555-1234 . . .5 http://a.b x@y.z n't"
    assert ptb_tokenize(text.replace(" ", x)) == ptb_tokenize(text)


# What can reach over a space, and what stands beside it.
PIECES = (
    "a dog word. A. The He's THE x. No. no. fig. 5 1/2 12 555 1234 (555) 5.5 . .. ... .5 ..a "
    "<b > <a b> ' 'n' n't it's U.S. http://a.b www.a.com x@y.z ’s “ “a” - 3-1 & $5 OK! é 狗 😀"
)
SPACES = ["", " ", "  ", "\t", "\u00a0", " \u00a0", "\u3000"]


@given(st.lists(st.tuples(st.sampled_from(PIECES.split()), st.sampled_from(SPACES))))
def test_pieces_give_the_tokens_of_the_whole_text(parts: list[tuple[str, str]]) -> None:
    text = "".join(piece + space for piece, space in parts)
    assert ptb_tokenize(text) == list(ptb._scan(text))


@given(st.text(alphabet="aAstTnmd159.,'’`-/&$#@:;!?\"()<>[]{}*_=^ \t\u00a0\u00adé", max_size=30))
def test_pieces_give_the_tokens_of_any_text(text: str) -> None:
    assert ptb_tokenize(text) == list(ptb._scan(text))


def test_many_pieces_are_forgotten_and_tokens_stay_the_same(monkeypatch) -> None:
    monkeypatch.setattr(ptb, "_PIECES", 3)
    monkeypatch.setattr(ptb, "_closed", ptb._ClosedPieces())
    text = " ".join(f"a{i}'s" for i in range(20))
    assert ptb_tokenize(text) == list(ptb._scan(text))
    assert len(ptb._closed) <= 3


class Counted:
    """A pattern that counts the characters it reads before it fails."""

    read = 0

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def match(self, text: str, place: int) -> re.Match[str] | None:
        match = self.rule.pattern.match(text, place)
        if match is None:
            Counted.read += self.rule.reach.match(text, place).end() - place
        return match


FAR = ["a&", "a,", "1a.", "&", "<!", "'", "-", ".", "a'", "www.&", "a&b.", "1,a.", "<a ", "a{", "é"]


@pytest.mark.parametrize("kind", FAR)
def test_a_rule_that_reads_far_and_fails_reads_no_place_twice(kind: str, monkeypatch) -> None:
    counted = {
        rule: replace(rule, pattern=Counted(rule)) if rule.reach else rule for rule in ptb.ALL_RULES
    }
    at = {start: tuple(map(counted.get, rules)) for start, rules in ptb.RULES_AT.items()}
    monkeypatch.setattr(ptb, "ALL_RULES", tuple(counted.values()))
    monkeypatch.setattr(ptb, "RULES_AT", at)
    monkeypatch.setattr(Counted, "read", 0)
    text = kind * 300
    list(ptb._scan(text))
    assert Counted.read <= len(text) * sum(rule.reach is not None for rule in counted)


@pytest.mark.parametrize("text", ["", " ", "...", "! ? , - --", "\u2028", "😀"])
def test_text_without_words_gives_no_token(text: str) -> None:
    assert ptb_tokenize(text) == []


@pytest.mark.shared
@pytest.mark.parametrize("text", [None, 3, ["a dog"], b"a dog"])
def test_what_is_no_text_is_refused(text: object) -> None:
    with pytest.raises(DataError, match="ptb_tokenize: the caption is"):
        ptb_tokenize(text)  # type: ignore[arg-type]


def test_all_golden_captions_are_tokenised_alike(shared: Callable[[str], Path]) -> None:
    golden = json.loads(shared("golden/flickr8k_dev_ptb.json").read_text(encoding="utf-8"))
    pairs = [p for each in golden.values() for p in zip(each["raw"], each["ptb"], strict=True)]
    assert len(pairs) == 5000
    differing = [raw for raw, ptb in pairs if " ".join(ptb_tokenize(raw)) != ptb]
    assert differing == []
