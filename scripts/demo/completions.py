"""Completions of held-out functions: chooses the prompts, and decides whether a completion parses.

A prompt is a held-out file up to the end of the signature of one top-level function (and of its docstring, if it has
one), cut on the left to `PROMPT_TOKENS`. The completion is the function's body: it ends before the first new top-level
statement, at `<|endoftext|>`, or after `MAX_NEW_TOKENS`. It parses

  - complete: the model ended it, and signature and body are valid Python;
  - as a beginning: the budget ran out, and the text up to the last line end can still be continued to valid Python
    (decided by `codeop`, which the interactive interpreter uses to ask for another line).

In both cases the body must have a statement of its own: blanks, comments or a lone docstring are not a completion.
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
      text: the text that the model reads.
      head: the end of `text` from the function's first line on, which a body must complete.
    """

    name: str
    text: str
    head: str


def prompts(sources: list[tuple[str, str]], tokenizer: tokenizers.Tokenizer, num_prompts: int) -> list[Prompt]:
    """Returns the first `num_prompts` functions of the held-out files in a fixed pseudo-random order."""
    functions = [prompt for name, text in sources for prompt in _prompts_of(name, text, tokenizer)]
    functions.sort(key=lambda prompt: hashlib.sha256(prompt.name.encode()).digest())
    return functions[:num_prompts]


def _prompts_of(name: str, text: str, tokenizer: tokenizers.Tokenizer) -> list[Prompt]:
    lines = text.split("\n")
    functions = []
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
            functions.append(Prompt(f"{name}:{node.name}", tokenizer.decode(ids[-PROMPT_TOKENS:]), head))
    return functions


def generate(model_dir: pathlib.Path, prompts: list[Prompt], *, temperature: float) -> list[tuple[str, bool]]:
    """Returns for each prompt the text that the engine generates, and whether the model ended it."""
    engine = jaxserve.Engine.from_pretrained(str(model_dir), dtype="float32")
    params = jaxserve.SamplingParams(temperature=temperature, max_tokens=MAX_NEW_TOKENS, seed=0)
    results = engine.generate([prompt.text for prompt in prompts], params)
    return [(result.outputs[0].text, result.outputs[0].finish_reason == "stop") for result in results]


def body_of(completion: str) -> tuple[str, bool]:
    """Returns the function's body, and whether a new top-level statement ended it."""
    match = _TOP_LEVEL.search(completion)
    return (completion, False) if match is None else (completion[: match.start()], True)


def parses(head: str, completion: str, *, ended: bool) -> str:
    """Returns "complete", "beginning" or "no".

    Args:
      head: the function's beginning.
      completion: the generated text.
      ended: True if the model ended the text.
    """
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
    """Returns how many completions parse, and quotes the first ones.

    Args:
      prompts: the prompts.
      completions: for each prompt the generated text, and whether the model ended it.
      num_shown: number of completions to quote.
    """
    verdicts = [parses(p.head, text, ended=ended) for p, (text, ended) in zip(prompts, completions, strict=True)]
    counts = {verdict: verdicts.count(verdict) for verdict in ("complete", "beginning", "no")}
    shown = [
        {"name": prompt.name, "head": prompt.head, "body": body_of(text)[0], "parses": verdict}
        for prompt, (text, _), verdict in zip(prompts, completions, verdicts, strict=True)
    ]
    share = 1 - counts["no"] / len(prompts)
    return {"num_prompts": len(prompts), "parses": counts, "parse_share": share, "first": shown[:num_shown]}
