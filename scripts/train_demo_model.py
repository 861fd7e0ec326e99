"""Trains the demo model with optax, on the nnx model that the engine serves; it can stop and resume at any time.

    python scripts/demo/corpus.py --work_dir=../demo_work && python scripts/demo/tokenizer.py --work_dir=../demo_work
    python scripts/train_demo_model.py --work_dir=../demo_work --minutes=90                    # constant learning rate
    python scripts/train_demo_model.py --work_dir=../demo_work --minutes=30 --decay            # then down to zero
    python scripts/train_demo_model.py --work_dir=../demo_work --export_to=jaxserve/demo_model

The first run writes `<work_dir>/stable.safetensors` and continues from it when it is called again. `--decay` starts from that
file, lowers the learning rate linearly to zero over its minutes, and writes `<work_dir>/decayed.safetensors`. To train longer,
continue the first run and decay again (warm-up, stable, decay: Hu et al., MiniCPM, 2024). The order of the data depends only on
the seed and the number of tokens seen.
"""

import dataclasses
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from absl import app, flags, logging
from demo import model as demo_model
from demo import tokenizer as demo_tokenizer
from flax import nnx
from jaxtyping import Array, Float32, Int32

from jaxserve.models import ModelConfig, Transformer, graphdef_of

Params = dict[str, jax.Array]
HeldoutLoss = Callable[[Params], float]
_LOG_EVERY = 20
_SAVE_EVERY_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sizes and rates of a training step.

    Attributes:
      context: tokens per sequence.
      batch_size: sequences per step.
      microbatch_size: sequences per gradient; divides batch_size.
      matrix_rate: learning rate of Muon, for the matrices of the blocks.
      vector_rate: learning rate of Adam, for the embedding and the norms.
      weight_decay: decoupled, of the matrices.
      warmup_steps: steps over which the learning rate rises from zero.
    """

    context: int = 512
    batch_size: int = 8
    microbatch_size: int = 2
    matrix_rate: float = 0.03
    vector_rate: float = 0.008
    weight_decay: float = 0.05
    warmup_steps: int = 30


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a run needs to continue: weights by name, the optimiser's state, and the steps and tokens so far."""

    params: Params
    optimizer: Any
    step: int = 0
    num_tokens: int = 0


class Weights:
    """Converts between an nnx model and a flat dict of its weights by dotted name."""

    def __init__(self, config: ModelConfig):
        self.graphdef = graphdef_of(config)
        state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
        leaves, self.treedef = jax.tree_util.tree_flatten_with_path(state)
        self.names = [".".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path) for path, _ in leaves]

    def of(self, model: Transformer) -> Params:
        return dict(zip(self.names, jax.tree.leaves(nnx.state(model)), strict=True))

    def state(self, params: Params) -> nnx.State:
        return self.treedef.unflatten([params[name] for name in self.names])

    def model(self, params: Params) -> Transformer:
        return nnx.merge(self.graphdef, self.state(params))


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Makes Muon (Jordan et al., 2024) for the matrices of the blocks, and Adam for the embedding and the norms."""

    def dimensions(params: Params) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
        ndims = {name: getattr(p, "ndim", 0) for name, p in params.items()}  # masked parameters have no ndim
        return {
            name: optax.contrib.MuonDimensionNumbers(0, ndim - 1) if ndim > 1 and "embedding" not in name else None
            for name, ndim in ndims.items()
        }

    return optax.contrib.muon(
        recipe.matrix_rate,
        weight_decay=recipe.weight_decay,
        adam_learning_rate=recipe.vector_rate,
        adam_b2=0.95,
        muon_weight_dimension_numbers=dimensions,
    )


def init_state(config: ModelConfig, recipe: Recipe, seed: int) -> TrainState:
    params = Weights(config).of(Transformer(config, rngs=nnx.Rngs(seed)))
    return TrainState(params, make_optimizer(recipe).init(params))


def loss_of(model: Transformer, sequences: Int32[Array, "N T"]) -> Float32[Array, ""]:
    """Returns the mean negative log likelihood in nats of every token after the first of each sequence."""
    hidden = demo_model.hidden_states(model, sequences[:, :-1])
    return demo_model.cross_entropy(hidden, model.embedding[...], sequences[:, 1:].reshape(-1))


def make_step(config: ModelConfig, recipe: Recipe):
    """Returns a jitted (params, optimizer, sequences[B, T + 1], rate_factor) -> (params, optimizer, loss)."""
    weights, optimizer = Weights(config), make_optimizer(recipe)

    def loss_and_grads(params: Params, part: jax.Array) -> tuple[jax.Array, Params]:
        return jax.value_and_grad(lambda params: loss_of(weights.model(params), part))(params)

    def step(params, state, sequences, rate_factor):
        parts = sequences.reshape(-1, recipe.microbatch_size, sequences.shape[1])

        def accumulate(total, part):
            return jax.tree.map(jnp.add, total, loss_and_grads(params, part)), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(accumulate, zeros, parts)
        loss, grads = jax.tree.map(lambda x: x / parts.shape[0], total)
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + rate_factor * u, params, updates)
        return params, state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def batch_at(tokens: np.ndarray, num_tokens: int, recipe: Recipe, seed: int) -> np.ndarray:
    """Returns the sequences [B, T + 1] of the step after `num_tokens`; every epoch has its own cuts and order."""
    per_epoch = len(tokens) // recipe.context - 1
    rows = []
    for i in range(num_tokens // recipe.context, num_tokens // recipe.context + recipe.batch_size):
        epoch, index = divmod(i, per_epoch)
        offset, order = _epoch(seed, epoch, per_epoch, recipe.context)
        start = offset + int(order[index]) * recipe.context
        rows.append(tokens[start : start + recipe.context + 1])
    return np.stack(rows).astype(np.int32)


_EPOCHS: dict[tuple[int, ...], tuple[int, np.ndarray]] = {}


def _epoch(seed: int, epoch: int, per_epoch: int, context: int) -> tuple[int, np.ndarray]:
    key = (seed, epoch, per_epoch, context)
    if key not in _EPOCHS:
        rng = np.random.default_rng(key)
        _EPOCHS[key] = int(rng.integers(context)), rng.permutation(per_epoch)
    return _EPOCHS[key]


def save_checkpoint(path: pathlib.Path, state: TrainState) -> None:
    """Writes weights, optimiser leaves in tree order, and counters (as metadata) to one file, which is replaced as a whole."""
    arrays = {f"params.{name}": np.asarray(p) for name, p in state.params.items()}
    arrays |= {f"optimizer.{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state.optimizer))}
    counters = {"counters": json.dumps({"step": state.step, "num_tokens": state.num_tokens})}
    part = path.with_suffix(".part")
    safetensors.numpy.save_file(arrays, str(part), metadata=counters)
    os.replace(part, path)


def load_checkpoint(path: pathlib.Path, like: TrainState) -> TrainState:
    """Reads a file of `save_checkpoint` into the structure of `like`."""
    with safetensors.safe_open(str(path), framework="numpy") as file:
        counters = json.loads(file.metadata()["counters"])
        params = {name: jnp.asarray(file.get_tensor(f"params.{name}")) for name in like.params}
        num_leaves = len(jax.tree.leaves(like.optimizer))
        leaves = [jnp.asarray(file.get_tensor(f"optimizer.{i}")) for i in range(num_leaves)]
    return TrainState(params, jax.tree.unflatten(jax.tree.structure(like.optimizer), leaves), **counters)


def make_heldout_loss(config: ModelConfig, tokens: np.ndarray, num_bytes: int, num_sequences: int = 48) -> HeldoutLoss:
    """Returns params -> bits per byte of a fixed sample of held-out windows; they do not overlap, so it is a bit too high."""
    weights, context = Weights(config), config.max_position
    starts = np.linspace(0, len(tokens) - context - 1, num_sequences).astype(int)
    rows = np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int32)

    @jax.jit
    def loss(params: Params) -> jax.Array:
        model = weights.model(params)
        return jax.lax.map(lambda part: loss_of(model, part), rows.reshape(-1, 4, context + 1)).mean()

    return lambda params: float(loss(params)) / np.log(2) * len(tokens) / num_bytes


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long a run trains, and whether the learning rate falls to zero in that time."""

    seconds: float
    decay: bool

    def rate_factor(self, elapsed: float, step: int, warmup_steps: int) -> float:
        return 1.0 - elapsed / self.seconds if self.decay else min(1.0, (step + 1) / warmup_steps)


def train(
    state: TrainState, recipe: Recipe, config: ModelConfig, tokens: np.ndarray, schedule: Schedule, seed: int, save
) -> TrainState:
    """Trains until the schedule's time is up or SIGTERM comes; saves at the end and every 10 minutes."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    step = make_step(config, recipe)
    start = last_save = last_log = time.monotonic()
    losses: list[float] = []
    while (elapsed := time.monotonic() - start) < schedule.seconds and not stopped.is_set():
        factor = schedule.rate_factor(elapsed, state.step, recipe.warmup_steps)
        sequences = batch_at(tokens, state.num_tokens, recipe, seed)
        params, optimizer, loss = step(state.params, state.optimizer, sequences, np.float32(factor))
        state = TrainState(params, optimizer, state.step + 1, state.num_tokens + recipe.batch_size * recipe.context)
        losses.append(float(loss))
        if len(losses) == _LOG_EVERY:
            speed = len(losses) * recipe.batch_size * recipe.context / (time.monotonic() - last_log)
            line = "step %d, %.2f M tokens, loss %.4f, rate factor %.3f, %.0f tokens/s"
            logging.info(line, state.step, state.num_tokens / 1e6, np.mean(losses), factor, speed)
            losses, last_log = [], time.monotonic()
        if time.monotonic() - last_save > _SAVE_EVERY_SECONDS:
            save(state)
            losses, last_save, last_log = [], time.monotonic(), time.monotonic()
    save(state)
    return state


def main(_) -> None:
    work_dir = pathlib.Path(WORK_DIR.value)
    config = demo_model.CONFIG
    recipe = Recipe(
        context=CONTEXT.value,
        batch_size=BATCH_SIZE.value,
        microbatch_size=MICROBATCH_SIZE.value,
        matrix_rate=MATRIX_RATE.value,
        vector_rate=VECTOR_RATE.value,
    )
    stable, decayed = work_dir / "stable.safetensors", work_dir / "decayed.safetensors"
    state = init_state(config, recipe, SEED.value)
    if EXPORT_TO.value:
        params = Weights(config).state(load_checkpoint(decayed, state).params)
        demo_model.export(params, demo_tokenizer.load(work_dir / "tokenizer"), pathlib.Path(EXPORT_TO.value))
        return
    if stable.exists():
        state = load_checkpoint(stable, state)
    logging.info("%d parameters, at step %d, %s", sum(p.size for p in state.params.values()), state.step, recipe)
    heldout_bytes = json.loads((work_dir / "sizes.json").read_text())["heldout"]
    heldout_loss = make_heldout_loss(config, np.load(work_dir / "heldout.npy"), heldout_bytes)

    def save(state: TrainState) -> None:
        path = decayed if DECAY.value else stable
        save_checkpoint(path, state)
        logging.info("saved %s; held-out %.4f bits per byte", path.name, heldout_loss(state.params))

    schedule = Schedule(60 * MINUTES.value, DECAY.value)
    train(state, recipe, config, np.load(work_dir / "train.npy"), schedule, SEED.value, save)


if __name__ == "__main__":
    defaults = Recipe()
    WORK_DIR = flags.DEFINE_string("work_dir", None, "Folder of tokens, tokenizer and checkpoints.", required=True)
    MINUTES = flags.DEFINE_float("minutes", 60.0, "Minutes to train.")
    DECAY = flags.DEFINE_bool(
        "decay", False, "Lower the learning rate to zero in that time; write decayed.safetensors."
    )
    EXPORT_TO = flags.DEFINE_string(
        "export_to", None, "Train nothing; write the decayed weights to this folder in bfloat16."
    )
    CONTEXT = flags.DEFINE_integer("context", defaults.context, "Tokens per sequence.")
    BATCH_SIZE = flags.DEFINE_integer("batch_size", defaults.batch_size, "Sequences per step.")
    MICROBATCH_SIZE = flags.DEFINE_integer("microbatch_size", defaults.microbatch_size, "Sequences per gradient.")
    MATRIX_RATE = flags.DEFINE_float("matrix_rate", defaults.matrix_rate, "Learning rate of Muon.")
    VECTOR_RATE = flags.DEFINE_float("vector_rate", defaults.vector_rate, "Learning rate of Adam.")
    SEED = flags.DEFINE_integer("seed", 0, "Seed of the initial weights and of the order of the data.")
    app.run(main)
