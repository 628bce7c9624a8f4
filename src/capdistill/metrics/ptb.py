"""Tokens as the COCO tool makes them: Penn Treebank rules, lower case, punctuation dropped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from capdistill.errors import require_text

_TWO_TOKENS = {"cannot", "gonna", "gotta", "lemme", "gimme", "wanna"}
_DROPPED = {"", "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_KIND = dict.fromkeys("0123456789", "0") | {"'": "'"}
_KIND |= dict.fromkeys("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "a")
_LINE_BREAK = re.compile(r"\r\n|[\n\r\x0b\x0c\x85\u2028\u2029]")

# What stands between two spaces is cut off and known once its tokens are, unless these may depend
# on what stands beside it: numbers ("3 1/2", "555 1234"), "A. The", "no. 5", ". . .5", mark-up.
# Such text is cut only at the spaces that part for certain; text with other white space nowhere.
_OPEN = re.compile(
    r"[<\s]|[0-9)]$|^\.+[^.]|(?:^|[^A-Za-z])[A-Za-z]\.$|[^A-Za-z][A-Za-z]+\.$"
    r"|^(?i:art|ca|figs?|nos?|op|pp|prop)\.$"
)
_CUT = re.compile(r"(?<![0-9). ]) +|(?<=[0-9)]) +(?![0-9 ])|(?<=\.) +(?![0-9A-Z. ])")
_UNCUT = re.compile(r"<|[^\S ]")
_PIECES, _LENGTH = 1 << 16, 40  # how many pieces are remembered, and how long ones


class _Open(Exception):
    """The tokens of a piece may depend on its neighbours."""


class _Pieces(dict[str, tuple[str, ...]]):
    """The tokens of the pieces met so far; when it is full it forgets them all."""

    def __missing__(self, piece: str) -> tuple[str, ...]:
        tokens = tuple(_scan(piece))
        if len(self) >= _PIECES:
            self.clear()
        if len(piece) <= _LENGTH:
            self[piece] = tokens
        return tokens


class _ClosedPieces(_Pieces):
    """The tokens of pieces that are the same whatever stands beside them."""

    def __missing__(self, piece: str) -> tuple[str, ...]:
        if _OPEN.search(piece):
            raise _Open
        return super().__missing__(piece)


_closed, _joined = _ClosedPieces(), _Pieces()


def ptb_tokenize(text: str) -> list[str]:
    """The tokens of one caption, as the COCO tool's tokeniser (in Java) gives them.

    Any white space separates, line breaks included: one caption stays one caption.

    Example:
        >>> ptb_tokenize("A man can't see the dogs' ball (red) .")
        ['a', 'man', 'ca', "n't", 'see', 'the', 'dogs', 'ball', '-lrb-', 'red', '-rrb-']

    Raises:
        DataError: it is not text.
    """
    try:
        if not isinstance(text, str):
            require_text(text, "ptb_tokenize: the caption")
        return list(chain.from_iterable(map(_closed.__getitem__, text.split(" "))))
    except _Open:
        return _with_neighbours(text)


def _with_neighbours(text: str) -> list[str]:
    """The tokens of a text in which some reach over a space."""
    if _UNCUT.search(text):
        return list(_scan(text))
    return list(chain.from_iterable(map(_joined.__getitem__, _CUT.split(text))))


def _scan(text: str) -> Iterator[str]:
    """The tokens by the rules alone, place by place."""
    text, place = _LINE_BREAK.sub(" ", text) + "\n", 0
    last = len(text.rstrip())
    failing: dict[Rule, int] = {}
    while place < len(text):
        if space := SPACE.match(text, place):
            place = space.end()
            continue
        token, place = _next(text, place, failing)
        if token not in _DROPPED:
            yield token if place < last else token.rstrip()


def _next(text: str, place: int, failing: dict[Rule, int]) -> tuple[str, int]:
    """The token at `place` ("" if there is none), and where the text continues."""
    plain = PLAIN_WORD.match(text, place)
    if plain and plain[0].lower() not in _TWO_TOKENS:
        return plain[0].lower(), plain.end()
    kind = _KIND.get(text[place])
    longest, end, write = 0, place + 1, None
    for rule in RULES_AT[kind] if kind else ALL_RULES:
        if rule.reach and place < failing.get(rule, 0):
            continue
        match = rule.pattern.match(text, place)
        if match and match.end() - place > longest:
            longest, end = match.end() - place, match.end(match.lastindex or 0)
            write = rule.write
        elif match is None and rule.reach:
            failing[rule] = rule.reach.match(text, place).end()  # type: ignore[union-attr]
    return (write(text[place:end]).lower() if write else ""), end


# Characters. The tool knows the letters and digits of Unicode 6.1, in 16 bits.
_LATER = (
    r"\U00010000-\U0010ffff\u037f\u0528-\u052f\u0560\u0588\u05ef\u0860-\u088e\u08a1\u08ad-\u08c9"
    r"\u0978\u0980\u09fc\u0af9\u0c34\u0c5a\u0c5d\u0c80\u0cdd\u0d04\u0d54-\u0d56\u0d5f\u0e86\u0e89"
    r"\u0e8c\u0e8e-\u0e93\u0e98\u0ea0\u0ea8\u0ea9\u0eac\u13f5-\u13fd\u16f1-\u16f8\u170d\u171f"
    r"\u1878\u191d\u191e\u19b0-\u19c0\u19c8\u19c9\u1b4c\u1c80-\u1cbf\u1cf2\u1cf3\u1cfa\u2c2f\u2c5f\u312e\u312f"
    r"\u31bb-\u31bf\u4db6-\u4dbf\u9fcd-\u9fff\ua698-\ua69d\ua78f\ua794-\ua79f\ua7ab-\ua7f7\ua8fd"
    r"\ua8fe\ua9e0-\ua9fe\uaa7e\uaa7f\uab30-\uabbf"
)
_NO_LETTER = (
    r"\W\d_²³¹¼-¾\u09f4-\u09f9\u0b72-\u0b77\u0bf0-\u0bf2\u0c78-\u0c7e\u0d58-\u0d5e\u0d70-\u0d78"
    r"\u0e4f\u0f2a-\u0f33\u1369-\u137c\u16ee-\u16f0\u17f0-\u17f9\u19da\u2070\u2074-\u2079"
    r"\u2080-\u2089\u2150-\u2182\u2185-\u2189\u2460-\u249b\u24ea-\u24ff\u2776-\u2793\u2cfd\u3007\u3021-\u3029"
    r"\u3038-\u303a\u3192-\u3195\u3220-\u3229\u3248-\u324f\u3251-\u325f\u3280-\u3289\u32b1-\u32bf"
    r"\ua6e6-\ua6ef\ua830-\ua835"
)
_MARKS = (  # join letters in words; a soft hyphen (00ad) is removed afterwards
    r"\u00ad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0375\u0378\u0379\u0384"
    r"\u0385\u03f6\u0483-\u0487\u055a-\u055f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"
    r"\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4\u06e7-\u06ed\u06fd\u06fe\u070f\u0711"
    r"\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c\u093e-\u094e\u0951-\u0955\u0962"
    r"\u0963\u0981-\u0983\u09bc\u09be-\u09c4\u09c7\u09c8\u09cb-\u09cd\u09d7\u09e2\u09e3"
    r"\u0a01-\u0a03\u0a3c\u0a3e-\u0a4f\u0a81-\u0a83\u0abc\u0abe-\u0acf\u0b82\u0bbe-\u0bc2"
    r"\u0bc6-\u0bc8\u0bca-\u0bcd\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e31"
    r"\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd"
)
_NO_DIGIT = r"\D\U00010000-\U0010ffff\u0de6-\u0def\ua9f0-\ua9f9"

D = rf"[^{_NO_DIGIT}]"
_RARE_AD = rf"[^\x00-\x7f{_NO_LETTER}{_LATER}]|[^\x00-\x7f{_NO_DIGIT}]"
_RARE_L = rf"[^\x00-\x7f{_NO_LETTER}{_LATER}]|[{_MARKS}]|(?i:&[aeiou](?:acute|grave|uml);)"
A = rf"(?:[A-Za-z]|[^\x00-\x7f{_NO_LETTER}{_LATER}])"
AD = rf"(?:[A-Za-z0-9]|{_RARE_AD})"
ADS = rf"{AD}[A-Za-z0-9]*(?:(?:{_RARE_AD})[A-Za-z0-9]*)*"  # AD+, quick for ASCII
L = rf"(?:[A-Za-z]|{_RARE_L})"
_LDS = rf"[A-Za-z0-9]*(?:(?:{_RARE_L}|[^\x00-\x7f{_NO_DIGIT}])[A-Za-z0-9]*)*"
L_LDS = L + _LDS
LDS = rf"(?:{L}|{D}){_LDS}"
SP = r"[ \t\xa0\u2000-\u200a\u3000]"
SPNL = r"[ \t\n\xa0\u2000-\u200a\u3000]"
APOS = r"(?:['\u2019\x92]|(?i:&apos;))"
N_APOS = r"(?:['\u2019\x92`\u2018\x91\u201b]|(?i:&apos;))"
CLITIC = rf"{APOS}(?:[msdMSD]|(?i:re|ve|ll))"
AMP = r"(?:(?i:&amp;)|&)"
BREAK = "[,;:\u3001]"  # before these a word keeps its full stop
ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
WORD = rf"{L_LDS}(?:[.!?]{L_LDS})*"
NUMBER = rf"(?:{D}*(?:[.:,\xad\u066b\u066c]{D}+)+|{D}+)"

# Abbreviations. The first keep their full stop whatever two characters follow.
_SENTENCE_FINAL = (
    "al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec "
    "ed.d esq est etc ext feb fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich "
    "minn mo mon mont neb nev nov oct okla penn ph.d plc rd rt sep sept seq sq sr sys tel tenn "
    "thu thurs tue tues univ va vt wed wis wisc wyo"
)
_CAPITALISED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"  # in lower case they are words
_BEFORE_NAMES = (
    "adj adm adv alex asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs "
    "elec ens ft gen gov govs hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt "
    "natl pfc ph pres prof profs pvt rep reps rev sen sens sfc sgt spc st ste supt supts treas "
    "vs wm"
)
_BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"
_STARTERS = (  # after these a single letter's full stop ends the sentence
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last "
    "Many More Mr. Ms. Now Once One Other Our She Since So Some Such That The Their Then There "
    "These They This We What When While Yet You"
)


def _any(words: str) -> str:
    return "(?i:" + "|".join(map(re.escape, sorted(words.split(), key=len, reverse=True))) + ")"


def _capital(words: str) -> str:
    """The words with a capital first letter, and either case behind it."""
    return "(?:" + "|".join(f"{w[0]}(?i:{re.escape(w[1:])})" for w in words.split()) + ")"


_FINAL = rf"(?:{_any(_SENTENCE_FINAL)}|{_capital(_CAPITALISED)}|(?i:pp?t)[ye](?i:s?))\."
_TITLE = rf"(?:{ACRONYM}|[A-Za-z]|{_any(_BEFORE_NAMES)}|(?i:m)[ft](?i:g))\."

# Addresses and mark-up. In a host's name the tool forbids all from the comma to the underscore.
_LABEL = r"[^ \t\n\f\r\"`'<>|(){},-_!$]"
_WWW = r"(?i:www)\.(?:[^ \t\n\f\r\"<>|.!?(){},]+\.)+[A-Za-z]{2,4}"
_PATH = r"/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},\-]"
_USER = r"(?:<|(?i:&lt;))?[a-zA-Z0-9][^ \t\n\f\r\"<>|(){}\xa0]*"
_NAME = r"[A-Za-z][A-Za-z0-9_:.\-]*"
_TAG = (
    rf"<(?:{_NAME}(?: +{_NAME}(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"))?)* */?|/{_NAME}) *>"
    r"|<[!?][A-Za-z\-][^>\n]*>"
)

# Compounds.
_THING = rf"(?:[dDoOlL]{N_APOS}{AD})?{ADS}"
_THINGS = rf"{_THING}(?:[\-_\u058a\u2010\u2011]{_THING})*"
_LIST = r"[A-Za-z0-9][A-Za-z0-9.,\xad]*"
_HYPHENATED = rf"{_LIST}(?:-(?:{ACRONYM}\.|[A-Za-z0-9\xad]+))+"
_COMPANY = r"[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+"
_SIDE = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_COUNTRIES = r"(?i:(?:canada|sino|korean|eu|japan|non)-u\.s|u\.s\.-(?:u\.k|u\.s\.s\.r))"
_FILE = rf"{LDS}(?:\.{LDS})*"
_FILES = _any(
    "bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf "
    "php pl png ppt ps py sql tar txt wav x xml zip"
)
_EYES = r"[\-^x=~<>']"
_QUOTES = r"[`\u2018-\u201f\x91-\x94\u2039\u203a\xab\xbb]{1,2}"


def _same(token: str) -> str:
    return token


def _without_soft_hyphens(token: str) -> str:
    return token.replace("\xad", "")


def _with_quotes(token: str) -> str:
    return token.replace("&apos;", "'").replace("&quot;", '"').translate(_LATEX)


def _with_ampersands(token: str) -> str:
    return re.sub("(?i:&amp;)", "&", token)


def _with_brackets(token: str) -> str:
    return token.translate(_BRACKETS)


def _as_mark(token: str) -> str:
    return _MARK.get(token.lower(), token)


_LATEX = str.maketrans(
    dict.fromkeys("\x91‘‛‹", "`")
    | dict.fromkeys("\x92’›", "'")
    | dict.fromkeys("\x93“«", "``")
    | dict.fromkeys('\x94”»"', "''")
)
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", " ": "\xa0"})
_MARK = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **dict.fromkeys(("–", "—", "―", "\x96", "\x97", "&mdash;", "&ndash;", "&md;"), "--"),
    **dict.fromkeys(("---", "----"), "--"),
    **{"…": "...", "\x85": "...", "&amp;": "&", "&lt;": "<", "&gt;": ">"},
    **dict.fromkeys("\x80¤€₠", "$"),
    **{"¢": "cents", "£": "#"},
    **{"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"},
}


@dataclass(frozen=True, eq=False)
class Rule:
    """A kind of token.

    Attributes:
        pattern: What it looks like.
        write: How the Treebank spells it.
        reach: For a rule that may read far and fail: the text in which it then fails everywhere.
    """

    pattern: re.Pattern[str]
    write: Callable[[str], str]
    reach: re.Pattern[str] | None


_LISTED: list[tuple[str, Rule]] = []


def _add(
    starts: str, pattern: str, write: Callable[[str], str] = _same, reach: str | None = None
) -> None:
    """Add a rule. Of ASCII letters (a), digits (0) and (') it begins with those in `starts`."""
    far = None if reach is None else re.compile(f"{reach}|")
    _LISTED.append((starts, Rule(re.compile(pattern), write, far)))


# Words that are two tokens; mark-up; entities.
_add("a", r"(?i:(can)not|(gon|wan)na|(got)ta|(lem|gim)me)")
_add("'", r"('[tT])(?i:is|was)")
_add("", _TAG, lambda token: token.replace(" ", "\xa0"), r"<[!?][A-Za-z\-][^>\n]*")
_add("", r"(?i:&(?:mdash|ndash|md|amp|lt|gt);)", _as_mark)
_add("", "(?i:&nbsp;)", lambda token: "")
_add("", r"(?i:&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);)")

# Words, what is clipped to them, and words with an apostrophe that are one token.
_add("a", rf"({WORD}){CLITIC}", _without_soft_hyphens)
_add("a", rf"([A-Za-z\xad]*[A-MO-Za-mo-z]\xad*)[nN]{N_APOS}[tT]", _without_soft_hyphens)
_add("a", WORD, _without_soft_hyphens)
_add("'", rf"{APOS}[nN]{APOS}?|{APOS}(?i:em|till?|cause)|{APOS}[2-9]0[sS]")
_add("a", rf"[lLdDjJ]{APOS}|(?i:dunkin|somethin|ol){APOS}")
_add("a", rf"[A-HJ-XZn]{N_APOS}{A}{{2,}}|{A}+[aeiouyAEIOUY]{N_APOS}[aeiouA-Z]{A}*")
_add("a", rf"(?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)|[oO]{N_APOS}[oO]")
_add("a", rf"([yY]{APOS}){A}")

# Addresses.
_add(  # at least two 16-bit characters
    "a",
    r"(?i:https?)://(?:[^ \t\n\f\r\"<>|(){}]+[^ \t\n\f\r\"<>|.!?(){},\-]"
    r"|[\U00010000-\U0010ffff])",
)
_add("a", rf"{_WWW}", _same, r"(?i:www\.)[^ \t\n\f\r\"<>|!?(){},]*")
_add("a", rf"{_WWW}{_PATH}", _same, r"(?i:www\.)[^ \t\n\f\r\"<>|!?(){},]*")
_add(
    "a",
    rf"(?:{_LABEL}+\.)+(?i:com|net|org|edu)(?:{_PATH})?",
    _same,
    rf"(?:{_LABEL}+\.)*{_LABEL}+",
)
_add(
    "a0",
    rf"{_USER}@(?:[^ \t\n\f\r\"<>|(){{}}.\xa0]+\.)*[^ \t\n\f\r\"<>|(){{}}.\xa0]+(?:>|(?i:&gt;))?",
    _same,
    _USER,
)
_add("", rf"@[a-zA-Z_][a-zA-Z_0-9]*|\#{L}+")
_add("'", rf"({CLITIC})[^A-Za-z]", _with_quotes)
_add("a", rf"[nN]{N_APOS}[tT]", _with_quotes)

# Numbers.
_add("0", rf"{D}{{1,2}}[\-/]{D}{{1,2}}[\-/]{D}{{2,4}}")
_add("0", rf"[\-+]?{NUMBER}", _without_soft_hyphens)
_add("", r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+)")
_add("0", rf"(?:{D}{{1,4}}[\- \xa0])?{D}{{1,4}}(?:\\?/|\u2044){D}{{1,4}}", _with_brackets)
_add(
    "a",
    rf"(?i:c\.d\.s|pro-|anti-|s{AMP}p-500|s{AMP}ls|cap{APOS}n|c{APOS}est)",
    _with_ampersands,
)
_add("", r"-(?i:[lr][rcs]b)-")
_add("a0", rf"{_SIDE}(?:\\?/{_SIDE}){{1,2}}")
_add("a", r"[A-Z]*\$")

# Abbreviations.
_add("a", rf"([A-Za-z])\.{SP}+(?:{_capital(_STARTERS)}|{_TAG}){SPNL}")
_add("a", rf"({_any(_BEFORE_NUMBERS)}\.){SPNL}?{D}")
_add("a", rf"({_FINAL})[\s\S]{{2}}|{_FINAL}|{_TITLE}")
_add("a", rf"({_COUNTRIES}){SPNL}")
_add("'", rf"({APOS}[0-9]{{2}}){SPNL}")
_add("a0", rf"({_FILE}\.{_FILES})(?:{SPNL}|[.?!,])", _same, _FILE)
_add("a", rf"({WORD}\.){BREAK}", _without_soft_hyphens)
_add(
    "0",
    r"(?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[\- \xa0])?[0-9]{2,4}[\- \xa0])"
    r"[0-9]{3,4}[\- \xa0]?[0-9]{3,5}"
    r"|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
    _with_brackets,
)

# Quotes, faces and runs of punctuation.
_add("", r"\"|(?i:&quot;)", _with_quotes)
_add("", r"([<>]?[:;=][\-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", _with_brackets)
_add(
    "a'",
    rf"{_EYES}_{_EYES}|\({_EYES}[_.]?{_EYES}\)|\([\^x=~<>]-[\^x=~<>'`]\)"
    r"|[\^x=~<>]\.\[\^x=~<>\]",
    _with_brackets,
)
_add("", r"-+", _as_mark)
_add("", r"(\.{3,5}|(?:\.[ \xa0]){2,4}\.)", lambda token: "...")
_add("", r"@+|_+|\#+|\*+|(?:\\\*){1,3}|[?!]+|<<|>>")

# Compounds.
_add("a0", rf"({_HYPHENATED}\.){BREAK}", _without_soft_hyphens, _LIST)
_add("a0", _HYPHENATED, _without_soft_hyphens, _LIST)
_add("a0", rf"({_THINGS}\.){BREAK}|{_THINGS}")
_add("a", rf"({_COMPANY}\.){BREAK}|{_COMPANY}", _with_ampersands)
_add("a", r"(?i:c\+\+|[cf]\#)")
_add("'", r"(')[A-Za-z][^ \t\n\xa0]", _with_quotes)
_add("'", CLITIC, _with_quotes)
_add("'", rf"''|{_QUOTES}|{APOS}", _with_quotes)

# Characters that are tokens by themselves; any other (emoji, controls) only separates.
_add(
    "'",
    r"[!-/:-@\[-`{-~\x80\x85\x91-\x94\x96\x97\u00a1-\u00a9\u00ab\u00ac\u00ae-\u00b4\u00b6-\u00b9"
    r"\u00bb-\u00bf\u00d7\u00f7\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603"
    r"\u0606-\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f8\u0964\u0965"
    r"\u0e3f\u0e4f\u1fbd\u2013-\u2017\u201a\u201e-\u2023\u2026\u2030-\u2038\u203b\u203e-\u2042"
    r"\u2044\u2070\u2074-\u207e\u2080-\u208e\u20a0\u20a4\u20ac\u2100-\u214f\u2153-\u215e"
    r"\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
    r"\uffe0\uffe1\uffe5\uffe6]",
    _as_mark,
)

ALL_RULES = tuple(rule for _, rule in _LISTED)
RULES_AT = {
    start: tuple(rule for starts, rule in _LISTED if start in starts) for start in ("a", "0", "'")
}
PLAIN_WORD = re.compile(r"[A-Za-z]+(?=[,;:!?\")]*[ \t\n])")
SPACE = re.compile(rf"[ \t\n]{SPNL}*")
