"""Output that follows a grammar: regular expressions and answers as automata, and the `logits_fn` that applies them."""

from jaxserve.grammar.answers import from_answers
from jaxserve.grammar.constraints import FREE, Constraints, combine, constrain
from jaxserve.grammar.patterns import from_regex

__all__ = ["FREE", "Constraints", "combine", "constrain", "from_answers", "from_regex"]
