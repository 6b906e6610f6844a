r"""Decide whether an answer is equivalent to the gold answer. `docs/grading.md` has the reasons.

`same_answer` rewrites both in plain LaTeX and splits equations, units and collections into single
values. math-verify compares these. All of this runs in the worker processes of `grader.py`, because
SymPy may hang, run out of memory or abort.
"""

import functools
import math
import re
import unicodedata
import zlib
from collections.abc import Iterator
from fractions import Fraction

import pint
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy import Derivative, Expr, I, Limit
from sympy.concrete.expr_with_limits import ExprWithLimits

# --- Plain LaTeX: what an answer means, not how it is drawn ---


def _table(text: str) -> dict[str, str]:
    """Return a dictionary of the words in `text`: key, value, key, value, ..."""
    words = text.split()
    return dict(zip(words[::2], words[1::2]))


_SYMBOLS = _table(r"""
− - – - ⁄ / ∕ / × \times · \cdot ⋅ \cdot ÷ \div ± \pm ∞ \infty ° ^\circ √ \sqrt ∛ \sqrt[3]
≤ \le ≥ \ge ≠ \ne ≈ \approx ∈ \in ∪ \cup ∩ \cap ∅ \emptyset
ℝ \mathbb{R} ℤ \mathbb{Z} ℚ \mathbb{Q} ℕ \mathbb{N} ℂ \mathbb{C}""")
_FACTORS = _table(r"""
percent \frac{1}{100} dozen 12 hundred 100 thousand 1000 million 10^{6} billion 10^{9}
trillion 10^{12}""")
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_WORDS |= dict.fromkeys(["infinity", "infinite", "infinitely many"], r"\infty")
_WORDS["empty set"] = r"\emptyset"


def _character(char: str) -> str:
    """Return ASCII LaTeX for one character."""
    if char.isascii():
        return char
    if char in _SYMBOLS:
        return _SYMBOLS[char] + " "
    if unicodedata.category(char) == "Cf":  # zero-width blanks and joiners
        return ""
    if greek := re.fullmatch(r"GREEK (\w+) LETTER (\w+)", unicodedata.name(char, "")):
        return "\\" + (greek[2].lower() if greek[1] == "SMALL" else greek[2].capitalize()) + " "
    plain = unicodedata.normalize("NFKC", char)
    if plain != char:
        plain = "".join(map(_character, plain))
    kind = unicodedata.decomposition(char).split(" ")[0]
    if kind == "<super>":
        return f"^{{{plain}}}"
    if kind == "<sub>":
        return f"_{{{plain}}}"
    if kind == "<fraction>":
        above, below = plain.split("/")
        return rf"\frac{{{above}}}{{{below}}}"
    return plain


def _one_group(match: re.Match) -> str:
    """Return x^{1}^{2}, from x¹², as x^{12}."""
    return f"{match[1]}{{{re.sub('[_^{}]', '', match[0])}}}"


def _repeating(match: re.Match) -> str:
    r"""Return a repeating decimal as a fraction: 0.1\overline{6} is (16 - 1) / 90."""
    whole, start, period = match[1] or "0", match[2], match[3]
    numerator = int(whole + start + period) - int(whole + start)
    return rf"\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(start)}}}"


def _factor(match: re.Match) -> str:
    r"""Return ` million` as `\times 10^{6}`, and reopen the \text{..} that it started."""
    return rf" \times {_FACTORS[match[2].lower()]}{match[1] or ''}"


def _command(names: str) -> str:
    """Return a pattern of LaTeX commands."""
    return rf"\\(?:{names.replace(' ', '|')})(?![A-Za-z])"


_REWRITES = [
    # "\n" stands for the row separator, in which the patterns below would find "\," or "\[".
    (r"\s+", " "),
    (r"\\\\", "\n"),
    # thousands: 1{,}000 and 1\,000 and 1,\!000
    (r"(?<=\d)(?:\{,\}|,?\\[,!] ?|,\\ )(?=\d{3}(?!\d))", ""),
    # no meaning: delimiters, blanks, color, size, weight, boxes, check marks, Markdown
    (r"(?<!\\)(\$\$?)((?:\\.|[^$\\])*)\1", r"\2"),
    (r"\\[()\[\]]", ""),
    (_command("left right big Big bigl bigr Bigl Bigr bigg Bigg") + r" ?\.?", ""),
    (r"\\[,;:! ]|~|" + _command("quad qquad enspace"), " "),
    (r"\\(?:text)?color ?\{[^{}]*\}", ""),
    (_command("tiny small normalsize large Large LARGE huge Huge displaystyle textstyle"), ""),
    (_command("boxed fbox bm boldsymbol mathbf mathit mathsf mathtt underline"), ""),
    (_command("checkmark blacksquare square Box therefore"), ""),
    (r"^ ?(\*+)(.*)\1 ?$", r"\2"),
    # one spelling of each thing
    (_command("dfrac tfrac cfrac"), r"\\frac"),
    (_command("textbf textit textrm textsf texttt textnormal emph mbox hbox mathrm"), r"\\text"),
    (r"\{ ?" + _command("rm bf it") + r"([^{}]*)\}", r"\\text{\1}"),
    (_command("rm bf it"), ""),
    (r"\{([,:=])\}", r"\1"),
    (_command("langle"), "("),
    (_command("rangle"), ")"),
    (_command("varnothing") + r"|\\\{ ?\\\}", r"\\emptyset"),
    (r"\^ ?(?:\\circ|o)(?![A-Za-z])|\^ ?\{ ?(?:\\circ|o) ?\}", r"^\\circ "),
    (_command("degree"), r"^\\circ "),
    (r"\*\*", "^"),
    (r"\^ ?(-\d+)", r"^{\1}"),
    (r"(?<![A-Za-z\\])(pi|sqrt)(?![A-Za-z])", r"\\\1"),
    (r"\\sqrt ?(\[3\])? ?(?:\(([^()]*)\)|(\d+))", r"\\sqrt\1{\2\3}"),
    # numbers: 1.5e-3, 1.5 x 10^3, 1 3/4, 0.1\overline{6}, 0.1666...
    (r"(?<![\w.}])(\d+(?:\.\d+)?)[eE]\+?(-?\d{1,3})(?![\w_])", r"\1 \\times 10^{\2}"),
    (r"(?<=\d) ?x ?(?=10 ?\^)", r" \\times "),
    (r"(?<![\w.])(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    (r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar|dot) ?\{?(\d+)\}?", _repeating),
    (r"(?<![\d.])(\d*)\.(\d*?)(\d+?)\3{2,}(?:\.\.\.|\\[cl]?dots(?![A-Za-z]))", _repeating),
    # factors written like units
    (r"(?i)(?<![a-z])per ?cent(?:age)?(?![a-z])|\\?%", "percent"),
    (rf"(?i)(?<=[\d)}}!]) ?(\\text ?\{{)? ?({'|'.join(_FACTORS)})s?(?![a-z])", _factor),
    # \text{Answer: } 8
    (r"(?i)^ ?(\\text ?\{)? ?(?:(?:[a-z]{3,} )*[a-z]{3,}:|(?:the |final )*answer is:?)", r"\1"),
    (r"\\text ?\{ ?\}", ""),
]
_REWRITES = [(re.compile(pattern, re.DOTALL), new) for pattern, new in _REWRITES]


@functools.lru_cache(8192)
def plain(text: str) -> str:
    r"""Return `text` in plain LaTeX: ASCII, no drawing commands, one spelling of each thing."""
    text = "".join(map(_character, text))
    if r"\begin" not in text:  # no rows: this is a command that was escaped twice
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    text = re.sub(r"([_^])\{[^{}]*\}(?:\1\{[^{}]*\})+", _one_group, text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    before = None
    while text != before:
        before = text
        text = text.strip(" \n`").lstrip("=:").rstrip(".,;:?")
        # braces or \text{..} around everything
        brackets = _brackets(text.removeprefix(r"\text").strip())
        if brackets and brackets[0] == "{":
            text = brackets[1]
    return _WORDS.get(text.lower(), text)


# --- Structure: equations, units, collections ---

_BRACKET = r"(?P<open>\\\{|[(\[{])|(?P<close>\\\}|[)\]}])|\\[A-Za-z]+"


def _tokens(text: str, pattern: str) -> Iterator[tuple[re.Match, int]]:
    """Yield the matches of `pattern` with the number of brackets open after each."""
    depth = 0
    for token in re.finditer(pattern, text):
        depth += bool(token["open"]) - bool(token["close"])
        yield token, depth


def _split(text: str, separator: str) -> list[str]:
    """Split `text` at the separators outside brackets."""
    parts, start = [], 0
    for token, depth in _tokens(text, f"(?P<separator>{separator})|{_BRACKET}"):
        if token["separator"] and depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def _brackets(text: str) -> tuple[str, str, str] | None:
    """Return (opening, content, closing) if one pair of brackets encloses all of `text`."""
    first = re.match(_BRACKET, text)
    if not first or not first["open"]:
        return None
    last = next((token for token, depth in _tokens(text, _BRACKET) if depth == 0), None)
    if not last or last.end() != len(text):
        return None
    return first[0], text[first.end() : last.start()].strip(), last[0]


_GREEK = "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma "
_GREEK += "tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell"
_ACCENTED = r"\\(?:hat|bar|vec|tilde|mathcal|overline) ?\{? ?\w+\}?"
_INDEX = r"(?: ?'| ?_ ?(?:\w|\{[^{}]*\})| ?\^ ?\{? ?(?:\*|\\prime|-1(?=\}? ?\())\}?)*"
_LETTER = rf"(?:[A-Za-z]|{_command(_GREEK)}|{_ACCENTED}){_INDEX}"
_ARGUMENT = r"-?[\w\\{}. ]+"
_OPERATOR = _command("max min sup inf lim deg dim det gcd lcm rank int sum prod")
_OPERAND = r"(?:[^=+(){}-]|\([^()]*\)|\{[^{}]*\})*"
_NAMES = [
    rf"{_LETTER}(?: ?\({_ARGUMENT}(?:,{_ARGUMENT})*\))?",  # x, a_n, f'(2), P(A), f(x, y)
    rf"\({_LETTER}(?: ?, ?{_LETTER})+ ?\)",  # (x, y)
    r"(?:m ?)?(?:\\(?:angle|triangle) )?\|?[A-Z]{1,4}\|?",  # AB, \angle ABC
    r"(?:[EP]|\\Pr|\\mathbb\{[EP]\}) ?(?:\([^()]*\)|\[[^\[\]]*\])",  # P(X > 2), E[X]
    rf"{_OPERATOR}{_OPERAND}|\\operatorname ?{_OPERAND}",  # \max f, \int f(x) dx
    r"\\frac ?\{d ?\w*\} ?\{d ?\w\}",  # dy/dx
    r"[A-Za-z][a-z]{3,}(?: [a-z]+)*",  # Area of the circle
]
_NAME = rf"(?:{'|'.join(_NAMES)})"
_NAME = re.compile(rf"{_NAME}|\\text ?\{{[A-Za-z' .,-]+\}} ?{_NAME}?")  # \text{Area of } ABC
_APPROX = _command("approx")
_EQUALS = r"(?<![<>!])=|\\in(?![A-Za-z])"
_INEQUALITY = r"[<>]=?|\\(?:[lg]eq?(?:slant)?|[lg]t|neq?)(?![A-Za-z])"
_LIST = r"[,;]|\\text ?\{ ?,? ?(?:and|or) ?\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"


def _equation(text: str) -> tuple[list[str], list[str]]:
    r"""Return the names [x] and the values [3 + 5, 8] in x = 3 + 5 = 8 \approx 8.0.

    There is at least one value. Any other text is one value without a name. A value after
    \approx counts only if there is no exact one.
    """
    equations = [part for part in _split(text, _LIST) if len(_split(part, _EQUALS)) > 1]
    if len(equations) > 1:  # a list: x = 1, y = 2
        return [], [text]
    exact, *rounded = _split(text, _APPROX)
    parts = [part for part in _split(exact, _EQUALS) if part]
    names = [part for part in parts if _NAME.fullmatch(part)]
    values = [part for part in parts if part not in names] or rounded
    if not values:  # x = \text{even}
        return names[:-1], names[-1:] or [text]
    return names, values


_SHORT_UNITS = "mm|cm|km|mg|kg|ml|mL|ft|yd|mi|in|lbs?|oz|hrs?|mins?|secs?|deg|rad|mph|st|nd|rd|th"
_SHORT_UNITS += r"|[aApP]\.?[mM]\.?|m(?=/s)|(?<=/)[hs]"
_UNIT = (
    rf"(?:\\text ?\{{[^{{}}]*\}}|\^\\circ ?[CF]?|{_SHORT_UNITS}|(?<= )[A-Za-z]{{4,}})(?![A-Za-z])"
)
_UNIT += r"(?: ?\^ ?\{? ?-?\d ?\}?)?(?: ?(?:/|\\cdot) ?| )?"
_WITH_UNIT = re.compile(rf"(?P<value>.*?(?:[\d)}}!]|\\pi)) ?(?P<unit>(?:{_UNIT})+)")
_MONEY = re.compile(r"(?P<sign>[-+]?) ?(?:\\?\$|\\text ?\{ ?\\?\$ ?\}) ?(?P<value>[^$]+)")
_NUMERIC_COMMANDS = re.compile(_command("frac sqrt pi times cdot div binom"))
_NOT_UNITS = {*"or and not no than less more least most about is plus minus times mod".split()}
_NOT_UNITS |= {*"squared cubed factorial halves thirds fourths fifths tenths hundredths".split()}
_NOT_UNITS |= {"thousandths"}


def _unit(text: str) -> tuple[str, str]:
    r"""Return value and unit: 15 and `cm^2` for 15 \text{ cm}^2. The unit may be empty."""
    if money := _MONEY.fullmatch(text):
        return money["sign"] + _unit(money["value"])[0], "dollars"
    match = _WITH_UNIT.fullmatch(text)
    if not match or re.search("[A-Za-z$]", _NUMERIC_COMMANDS.sub("", match["value"])):
        return text, ""  # in 2t, t is not a unit
    unit = re.sub(r"\\text ?|[{}.]", "", match["unit"]).replace(r"\cdot", " ")
    unit = re.sub(r"\^\\circ|\bdeg(rees?)?\b", " degrees ", unit)
    unit = " ".join(unit.split())
    known = re.fullmatch("[A-Za-z0-9 /^-]+", unit)
    if not known or _NOT_UNITS & set(unit.lower().split()):
        return text, ""
    return match["value"], unit


@functools.cache
def _registry() -> pint.UnitRegistry:
    registry = pint.UnitRegistry()
    registry.define("dollar = [money] = USD")
    registry.define("cent = 0.01 dollar")
    return registry


_DEGREE = r"\frac{\pi}{180}"  # in radians


@functools.lru_cache(4096)
def _conversion(unit: str, target: str) -> str | None:
    """Return the factor that converts `unit` to `target`; None if there is none."""
    if unit.lower().rstrip("s") == target.lower().rstrip("s"):
        return "1"
    try:
        ratio = _registry().Quantity(1, unit).to(target).magnitude
    except Exception:  # an unknown unit or another dimension; Pint raises many types
        return None
    if unit == "degrees":
        return _DEGREE
    if target == "degrees":
        return r"\frac{180}{\pi}"
    # 1/60 is not exact as a float, but 60 is.
    fraction = Fraction(max(ratio, 1 / ratio)).limit_denominator(10**6)
    above, below = fraction.as_integer_ratio() if ratio > 1 else (1 / fraction).as_integer_ratio()
    return rf"\frac{{{above}}}{{{below}}}"


_GROUPED = re.compile(r"[-+]?[1-9]\d{0,2}(?=([, ]))(?:\1\d{3})+(?:\.\d+)?(?: ?\\times [^,]*)?")
_COLUMN = re.compile(r"\\begin ?\{([pbvB]?matrix)\}([^&]*)\\end ?\{\1\}")


def _collection(text: str) -> tuple[str, list[str]]:
    r"""Return brackets and parts: "()" and [1, 2] for (1, 2).

    The brackets are "," for a list without any, and "" for a single value such as x or 1,000.
    """
    if match := _GROUPED.fullmatch(text):
        return "", [re.sub(rf"{match[1]}(?=\d{{3}})", "", text)]
    if column := _COLUMN.fullmatch(text):
        return "()", [part.strip() for part in column[2].strip(" \n").split("\n")]
    if brackets := _brackets(text):
        opening, content, closing = brackets
        return opening + closing, _both_signs(_split(content, "[,;]"))
    parts = _both_signs([part for part in _split(text, _LIST) if part])
    return "," if len(parts) > 1 else "", parts


def _both_signs(parts: list[str]) -> list[str]:
    r"""Replace each 1 \pm x by 1 + x and 1 - x."""
    signs = [("+", "-") if r"\pm" in part else ("",) for part in parts]
    return [part.replace(r"\pm", sign) for part, both in zip(parts, signs) for sign in both]


# --- Comparison ---


def same_answer(gold: str, answer: str) -> bool:
    """Return whether `answer` is equivalent to `gold`. Both are LaTeX without the box."""
    return _same(plain(gold), plain(answer))


def is_comparable(gold: str) -> bool:
    """Return whether `gold` has a value. Hangs if every comparison with it would."""
    text = plain(gold)
    return text not in ("", r"\$") and (_value(text) is None or _verify(text, text))


def _same(gold: str, answer: str) -> bool:
    if not gold or not answer:
        return False
    if _spelling(gold) == _spelling(answer) or _chooses(gold, answer):
        return True
    names, values = _equation(gold)
    other_names, others = _equation(answer)
    is_equation = len(names + values) > 1
    other_is_equation = len(other_names + others) > 1
    if not is_equation and not other_is_equation:
        return _same_quantity(values[0], others[0])
    if not is_equation:  # 12 and x = 12
        return all(_same(gold, value) for value in others)
    if not other_is_equation:  # f(x) = 3x and 3x
        return bool(names) and _same(values[-1], answer)
    if set(map(_spelling, names)) & set(map(_spelling, other_names)):
        return all(_same(values[-1], value) for value in others)
    if names and _is_constant(values[-1]):  # x = 5 and 2x = 10: that may be the question
        return False
    return _same_value(gold, answer)  # y = 2x + 1 and 2x - y + 1 = 0


def _same_quantity(gold: str, answer: str) -> bool:
    value, unit = _unit(gold)
    other, other_unit = _unit(answer)
    if not unit and not other_unit:
        return _same_collection(gold, answer)
    if unit and other_unit:
        factor = _conversion(other_unit, unit)
        if factor is None:
            return False
        if factor == "1":
            return _same(value, other)
        return _same_value(value, rf"({other}) \cdot {factor}")
    if _same(value, other):
        return True
    if "degrees" not in (unit, other_unit):
        return False
    # The side without a unit may be in radians.
    if unit:
        return _same_value(rf"({value}) \cdot {_DEGREE}", other)
    return _same_value(value, rf"({other}) \cdot {_DEGREE}")


def _same_collection(gold: str, answer: str) -> bool:
    brackets, parts = _collection(gold)
    other_brackets, others = _collection(answer)
    if len(parts) == len(others) == 1:
        if parts + others == [gold, answer]:
            return _same_value(gold, answer)
        return _same(parts[0], others[0])
    if len(parts) == 1 and other_brackets == ",":  # 3/4 or 0.75
        return all(_same(parts[0], other) for other in others)
    if len(parts) == 1 or len(others) == 1:  # (-oo, 3) and x < 3
        return _same_value(gold, answer)
    if len(parts) != len(others):
        return False
    kinds = {brackets, other_brackets}
    # A set and a tuple differ, and so do two intervals. Longer tuples may have any brackets.
    if "," not in kinds and len(kinds) == 2 and (r"\{\}" in kinds or len(parts) == 2):
        return False
    if kinds - {",", r"\{\}"} or _named(parts) != _named(others):
        return all(map(_same, parts, others))
    rest = list(others)
    for part in parts:
        match = next((other for other in rest if _same(part, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _named(parts: list[str]) -> bool:
    """Return whether the parts have different names, as in x = 1, y = 2."""
    return len({name for part in parts for name in _equation(part)[0]}) > 1


def _spelling(text: str) -> str:
    """Remove blanks, except between digits."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _chooses(gold: str, answer: str) -> bool:
    """Return whether `answer` picks the choice `gold`: Option B, (B) 12."""
    label = re.fullmatch(r"\(?([A-J])\)?", gold)
    if not label:
        return False
    answer = re.sub(r"\\text|[{}]", "", answer).strip()
    chosen = re.fullmatch(r"(?i:option |choice )?\(?([A-J])(?:\)|[.:](?!\d)|$)(.*)", answer)
    if not chosen or label[1] != chosen[1]:
        return False
    return not re.search(r"\b(?:[A-J]|or|and)\b", chosen[2])  # (A) or (B)


def _words(text: str) -> str:
    """Return words in lower case without a plural s; "" for anything else."""
    words = re.sub(r"\\text ?|[{}]", "", text).lower().split()
    if not all(re.fullmatch("[a-z'-]+", word) for word in words):
        return ""
    return " ".join(word.removesuffix("s") for word in words)


def _number(text: str) -> Fraction | None:
    """Return a plain number, a fraction of integers or an integer in another base: 101_2."""
    text = _spelling(text)
    if re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)", text):
        return Fraction(text)
    try:
        if match := re.fullmatch(r"(-?\d+\.?\d*)\\(?:times|cdot) ?10\^\{?(-?\d{1,3})\}?", text):
            return Fraction(f"{match[1]}e{match[2]}")
        if match := re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}", text):
            fraction = Fraction(int(match[2]), int(match[3]))
            return -fraction if match[1] else fraction
        if re.fullmatch(r"-?\d+/\d+", text):
            return Fraction(text)
        if match := re.fullmatch(r"\(?([\dA-Fa-f]*\d[\dA-Fa-f]*)\)?_\{?(\d+)\}?", text):
            return Fraction(int(match[1], int(match[2])))
    except (ValueError, ZeroDivisionError):  # 19_8, 1/0
        pass
    return None


_TRIGONOMETRIC = re.compile(_command("sin cos tan cot sec csc"))
_PARSER_RULES = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")


@functools.lru_cache(8192)
def _value(text: str):
    """Return `text` as a SymPy object; None if math-verify's parser cannot read it."""
    # The parser ignores the subscript of a number, and reads 1 2 as 1 + 2, like 1 \frac{2}{3}.
    if re.search(r"\d ?_|(?<![_\d])\d+ \d", text):
        return None
    text = re.sub(r"(?<=[\d)])(?<![_^]\d) ?\(", r" \\cdot (", text)  # 2(3) would be 2 + 3, too
    try:
        value = latex2sympy(
            text.replace("\n", r"\\"),
            is_real=not should_treat_as_complex(text),
            convert_degrees=bool(_TRIGONOMETRIC.search(text)),
            normalization_config=_PARSER_RULES,
        )
        if isinstance(value, Expr):
            value = value.subs({symbol: I for symbol in value.free_symbols if symbol.name == "i"})
    except Exception:  # the parser raises many types
        return None
    return value


def _same_value(gold: str, answer: str) -> bool:
    words = _words(gold)
    if words and words == _words(answer):
        return True
    numbers = _number(gold), _number(answer)
    # Decimals may be rounded; math-verify checks how far.
    if None not in numbers and (numbers[0] == numbers[1] or "." not in gold + answer):
        return numbers[0] == numbers[1]
    if _value(gold) is None or _value(answer) is None:
        return False
    # SymPy would solve 2x < 6 or an integral, but these may be the question.
    if _is_solved(answer) is False and _is_solved(gold) is not False:
        return False
    if _is_open(_value(answer)) and not _is_open(_value(gold)):
        return False
    return not _differ(gold, answer) and _verify(gold, answer)


def _is_constant(text: str) -> bool:
    """Return whether `text` is a value without letters."""
    return not getattr(_value(text), "free_symbols", True)


def _is_expression(value) -> bool:
    """Return whether `value` is a number or formula: no set, relation or matrix."""
    return isinstance(value, Expr) and not value.is_Matrix


def _is_open(value) -> bool:
    """Return whether `value` has a sum, product, integral, limit or derivative to work out."""
    return _is_expression(value) and value.has(ExprWithLimits, Limit, Derivative)


def _is_solved(text: str) -> bool | None:
    """Return whether an inequality only compares a name with numbers; None if it is not one."""
    parts = _split(text, _INEQUALITY)
    if len(parts) == 1:
        return None
    return all(_NAME.fullmatch(part) or _is_constant(part) for part in parts)


def _differ(gold: str, answer: str) -> bool:
    """Return whether two values clearly differ. SymPy's `simplify` takes far longer to say so."""
    if _is_expression(_value(gold)) != _is_expression(_value(answer)):  # a number and a set
        return True
    one, two = _sample(gold), _sample(answer)
    try:
        return bool(abs(one - two) > 1e-5 * max(1, abs(one)))
    except TypeError:  # not both are numbers
        return False


@functools.lru_cache(8192)
def _sample(text: str):
    """Return the value of an expression where its letters have certain values between 1 and 2."""
    value = _value(text)
    if not _is_expression(value) or _is_open(value):  # a sum may not have 1.37 terms
        return None
    point = {letter: 1 + zlib.crc32(letter.name.encode()) / 2**32 for letter in value.free_symbols}
    try:
        return value.subs(point).evalf()
    except Exception:  # SymPy raises many types
        return None


def _verify(gold: str, answer: str) -> bool:
    zeros = _zeros(gold)
    return verify(
        _value(gold),
        _value(answer),
        float_rounding=6 + zeros,
        numeric_precision=15 + zeros,
        allow_set_relation_comp=True,
        timeout_seconds=None,
    )


@functools.lru_cache(4096)
def _zeros(text: str) -> int:
    """Return how many zeros follow the decimal point of the smallest number in `text`.

    math-verify rounds to 15 decimals (6 for floats), so 1/2^99 would equal 1/2^98.
    """
    value = _value(text)
    parts = [value, *getattr(value, "args", ())]
    numbers = [part.evalf() for part in parts if getattr(part, "is_number", False)]
    sizes = [abs(float(number)) for number in numbers if number.is_Float]
    return max([int(-math.log10(size)) for size in sizes if 0 < size < 1], default=0)
