"""Held-out completions: which prompts, and what counts as parsing.

A prompt is a held-out file up to the end of the signature of one top-level function (and of its docstring, if it has
one), cut on the left to `PROMPT_TOKENS`. The completion is the function's body: it ends before the first new top-level
statement, at `<|endoftext|>`, or after `MAX_NEW_TOKENS`. It parses

  - complete: it ended by itself, and signature and body are valid Python;
  - as a beginning: the budget ran out, and what stands up to the last line end can still be continued to valid Python
    (decided by `codeop`, which the interactive interpreter uses to ask for another line).

Either way the body must have a statement of its own, so that blanks, comments or a lone docstring are no completion.
"""

import ast
import codeop
import dataclasses
import hashlib
import pathlib
import re
import warnings

import tokenizers

import jaxserve

PROMPT_TOKENS = 320
MAX_NEW_TOKENS = 160
_TOP_LEVEL = re.compile(r"\n(?=[^\s#)\]}])")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A place in a held-out file.

    Attributes:
      name: the file, and the function's name.
      text: what the model reads.
      head: the end of `text` from the function's first line on: what a body must complete.
    """

    name: str
    text: str
    head: str


def prompts(sources: list[tuple[str, str]], tokenizer: tokenizers.Tokenizer, num_prompts: int) -> list[Prompt]:
    """The first `num_prompts` functions of the held-out files in a fixed pseudo-random order."""
    found = [prompt for name, text in sources for prompt in _prompts_of(name, text, tokenizer)]
    found.sort(key=lambda prompt: hashlib.sha256(prompt.name.encode()).digest())
    return found[:num_prompts]


def _prompts_of(name: str, text: str, tokenizer: tokenizers.Tokenizer) -> list[Prompt]:
    lines = text.split("\n")
    found = []
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        has_docstring = ast.get_docstring(node) is not None
        body = node.body[1:] if has_docstring else node.body
        if not body or body[0].lineno <= node.lineno:
            continue
        end = node.body[0].end_lineno if has_docstring else body[0].lineno - 1
        head = "\n".join(lines[node.lineno - 1 : end])
        ids = tokenizer.encode("\n".join(lines[:end])).ids
        if len(tokenizer.encode(head).ids) < PROMPT_TOKENS:
            found.append(Prompt(f"{name}:{node.name}", tokenizer.decode(ids[-PROMPT_TOKENS:]), head))
    return found


def generate(model_dir: pathlib.Path, prompts: list[Prompt], *, temperature: float) -> list[tuple[str, bool]]:
    """Per prompt the text that the engine generates, and whether it stopped by itself."""
    engine = jaxserve.Engine.from_pretrained(str(model_dir), dtype="float32")
    params = jaxserve.SamplingParams(temperature=temperature, max_tokens=MAX_NEW_TOKENS, seed=0)
    results = engine.generate([prompt.text for prompt in prompts], params)
    return [(result.outputs[0].text, result.outputs[0].finish_reason == "stop") for result in results]


def body_of(completion: str) -> tuple[str, bool]:
    """The function's body, and whether a new top-level statement ended it."""
    match = _TOP_LEVEL.search(completion)
    return (completion, False) if match is None else (completion[: match.start()], True)


def parses(head: str, completion: str, *, ended: bool) -> str:
    """ "complete", "beginning" or "no"; `ended`: the model stopped by itself."""
    body, closed = body_of(completion)
    if closed or ended:
        return "complete" if _has_statement(body) and _is_valid(head + body + "\n", unfinished=False) else "no"
    body = body[: body.rfind("\n") + 1]
    return "beginning" if _has_statement(body) and _is_valid(head + body, unfinished=True) else "no"


def _has_statement(body: str) -> bool:
    lines = body.split("\n")
    starts = ("\n".join(lines[: i + 1]) for i in range(len(lines)))
    return any(_is_valid(f"def _():{start}\n", unfinished=False) for start in starts)


def _is_valid(source: str, *, unfinished: bool) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Invalid escape sequences in generated strings.
        try:
            if unfinished:
                codeop.compile_command(source, symbol="exec")
            else:
                ast.parse(source)
        except (SyntaxError, ValueError, OverflowError):
            return False
    return True


def report(prompts: list[Prompt], completions: list[tuple[str, bool]], num_shown: int = 5) -> dict[str, object]:
    """Shares of what parses, and the first `num_shown` completions as they are.

    Args:
      prompts: what was completed.
      completions: per prompt the text generated, and whether the model stopped by itself.
      num_shown: how many to quote, from the first on.
    """
    verdicts = [parses(p.head, text, ended=ended) for p, (text, ended) in zip(prompts, completions, strict=True)]
    counts = {verdict: verdicts.count(verdict) for verdict in ("complete", "beginning", "no")}
    shown = [
        {"name": prompt.name, "head": prompt.head, "body": body_of(text)[0], "parses": verdict}
        for prompt, (text, _), verdict in zip(prompts, completions, verdicts, strict=True)
    ]
    share = 1 - counts["no"] / len(prompts)
    return {"num_prompts": len(prompts), "parses": counts, "parse_share": share, "first": shown[:num_shown]}
