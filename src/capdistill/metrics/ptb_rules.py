"""The rules of the Penn Treebank tokeniser that the COCO tool runs (Stanford's, of 2014).

Each rule is a regular expression. At every place the longest match wins, and the first of
equally long ones; where a rule has a group, the token is the group: what was matched behind it
counts as length but stays in the text.
They were written from the Treebank's conventions and that tool's behaviour, quirks included.
"""

from __future__ import annotations

import re

# Letters, with the combining marks that words of many scripts need; superscripts, fractions and
# enclosed numbers are no letters. A soft hyphen joins, and is removed afterwards.
_NO_LETTER = (
    r"\W\d_²³¹¼½¾\u0e4f\u2070-\u20ff\u2140-\u2189\u2460-\u24ff\u2776-\u2793\u3007\u3021-\u3029"
)
_MARKS = (
    r"\u00ad\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"
    r"\u0610-\u061a\u064b-\u065e\u0670\u06d6-\u06ed\u0900-\u0903\u093c-\u094e\u0962\u0963"
    r"\u0981-\u0983\u09bc-\u09d7\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
)
L = rf"(?:[^{_NO_LETTER}]|[{_MARKS}]|&[aeiouAEIOU](?:acute|grave|uml);)"
LD = rf"(?:{L}|\d)"
APOS = r"(?:['\u2019\x92]|&apos;)"
N_APOS = r"(?:['\u2019\x92`\u2018\x91\u201b]|&apos;)"
CLITIC = r"(?:(?:'|&apos;)(?:[msd]|re|ve|ll)(?![A-Za-z])|[\u2019\x92](?:re|ve|ll|[msd]))"
END = r"(?![A-Za-z0-9])"
ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
WORD = rf"{L}{LD}*(?:[.!?]{L}{LD}*)*"
NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"

ABBREVIATIONS = (
    "adj adm adv al ala alex apr ariz assn asst atty attys aug ave bancorp bhd bldg blvd brig "
    "bros calif capt cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs "
    "elec ens esq est etc ext feb fla fri ft ga gen gov govs hon inc ind insp intl invt jan jos "
    "jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr "
    "mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte ppty pptys pres prof profs "
    "pte ptes pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt "
    "supts sys tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo"
)
CAPITALISED = "ark az del ill la mass miss ore pa tex wash"  # in lower case they are words
BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"
STARTERS = (  # after these a single letter's full stop ends the sentence
    "A About According Additionally After An As At But He Her Here How However If In It Last "
    "Many More Now Once One Other Our She Since So Some Such That The Their Then There These "
    "They This We What When While Yet You"
)

_ATTRIBUTE = r"""\s+[A-Za-z][\w:.-]*(?:\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>]+))?"""
_HOST = r"(?-i:[^\s\"`'<>|(){},\-./0-9:;=?@A-Z\[\\\]^_$!]+)\."
_PATH = r"(?:/[^\s\"<>|()]+[^\s\"<>|.!?(){},\-])?"
_HYPHENATED = rf"(?:-(?:{ACRONYM}\.|(?:[dol]{APOS})?[A-Za-z0-9\u00ad]+))+"
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_FILES = (
    "bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png"
    "|ppt|ps|py|sql|tar|txt|wav|x|xml|zip"
)
_EYES = r"[\-^x=~<>']"


def _any(words: str) -> str:
    return "|".join(sorted(words.split(), key=len, reverse=True))


_PATTERNS = (
    # Mark-up and addresses.
    rf"</?[A-Za-z][\w:.-]*(?:{_ATTRIBUTE})*\s*/?>|<[!?][^<>]*>",
    r"&(?:mdash|ndash|MD|amp|lt|gt|quot|apos|AMP|LT|GT);|&\#\d+;",
    r"https?://[^\s\"<>|()]+[^\s\"<>|.!?(){},\-]",
    rf"(?:www\.(?:[^\s\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}|(?:{_HOST})+(?:com|net|org|edu)){_PATH}",
    r"[a-zA-Z0-9][^\s\"<>|()@]*@(?:[^\s\"<>|().@]+\.)*[^\s\"<>|().@]+",
    rf"@[A-Za-z_][A-Za-z_0-9]*|\#{L}+",
    # Words that are two tokens.
    r"(can)not|(gon|wan)na|(got)ta|(lem|gim)me",
    rf"({APOS}t)(?:is|was)",
    rf"({L}{LD}*?)n{N_APOS}t",
    rf"n{N_APOS}t",
    rf"({L}{LD}*){CLITIC}",
    CLITIC,
    # Words with an apostrophe that are one token.
    rf"{APOS}n{APOS}|{APOS}n(?![A-Za-z0-9_])|{APOS}em|{APOS}till?|{APOS}cause|{APOS}[2-9]0s",
    rf"{APOS}[0-9]{{2}}(?!\S)",
    rf"y{APOS}|[lLdDjJ]{APOS}|dunkin{APOS}|somethin{APOS}|ol{APOS}",
    rf"(?-i:[A-HJ-XZn]){N_APOS}{L}{{2,}}",
    rf"[dol]{APOS}{LD}{{2,}}(?:-[A-Za-z0-9]+)*",
    rf"{L}+[aeiouy]{N_APOS}(?-i:[aeiouA-Z]){L}*",
    rf"cont{APOS}d\.|nor{APOS}easter|c{APOS}mon|e{APOS}er|s{APOS}mores|ev{APOS}ry|li{APOS}l"
    rf"|nat{APOS}l|o{APOS}o",
    # Numbers.
    r"(?:\(\d{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:\d{2,4}[\- \u00a0])?\d{2,4}[\- \u00a0])"
    r"\d{3,4}[\- \u00a0]?\d{3,5}",
    r"(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}",
    r"\d{1,2}[\-/]\d{1,2}[\-/]\d{2,4}",
    r"(?:\d{1,4}[\- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}",
    rf"[\-+]?{NUMBER}",
    r"(?-i:[A-Z]*)\$",
    # Abbreviations.
    rf"{ACRONYM}\.",
    rf"([A-Za-z])\.\s+(?-i:{_any(STARTERS)})(?![A-Za-z\-])",
    rf"(?:[A-Za-z]|{_any(ABBREVIATIONS)})\.",
    rf"(?:(?-i:{_any(CAPITALISED)})|{_any([word.upper() for word in CAPITALISED])})\."
    if False
    else rf"(?=(?-i:[A-Z]))(?:{_any(CAPITALISED)})\.",
    rf"((?:{_any(BEFORE_NUMBERS)})\.)\s*\d",
    rf"((?:ed|ph)\.d\.){L}*",
    # Words and names of files.
    rf"{LD}+(?:\.{LD}+)*\.(?:{_FILES})(?!{LD})",
    WORD,
    rf"{LD}+(?:[\-_\u058a\u2010\u2011]{LD}+)*",
    rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*{_HYPHENATED}",
    rf"{_SLASHED}(?:\\?/{_SLASHED}){{1,2}}",
    r"(?-i:[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+)|c\+\+|[cf]\#",
    r"-[LR][RSC]B-",
    # Faces and runs of punctuation.
    rf"[<>]?[:;=]['\-o]?(?-i:[()DPdpO\\{{@|\[\]]){END}",
    rf"{_EYES}_{_EYES}|\({_EYES}[_.]?{_EYES}\)",
    r"-+|<<|>>|''|``|\*+|_+|@+|[?!]+|\#{2,}|\\[*]",
)
RULES = tuple(re.compile(pattern, re.IGNORECASE) for pattern in _PATTERNS)

PLAIN_WORD = re.compile(r"[A-Za-z]+(?=[ \t\r\n]|$)")
SPACE = re.compile(r"[\s\x00-\x1f]+|&nbsp;")
# Characters that are tokens by themselves; any other (emoji, controls) only separates.
SYMBOL = re.compile(
    r"[!-/:-@\[-`{-~\x80\x85\x91-\x97\u00a1-\u00bf\u00d7\u00f7\u037e\u0387\u0589\u05be\u05c0\u05c3"
    r"\u060c\u061b\u061f\u066a\u06d4\u0964\u0965\u0e3f\u2013-\u2023\u2026\u2030-\u203b"
    r"\u203e-\u2042\u2044\u2070\u2074-\u208e\u20a0\u20a4\u20ac\u2100-\u214f\u2153-\u215e"
    r"\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
    r"\uffe0\uffe1\uffe5\uffe6]"
)
