"""Make golden/<name>.npz: the logits of the tiny checkpoints according to the reference libraries.

    python tests/make_golden.py --family mamba,mamba2
    python tests/make_golden.py --family gated_deltanet,kda

`--help` lists the families. Those of the second line need flash-linear-attention, all others torch
and transformers.

Run the second line in a virtual environment of its own: transformers picks up an installed
flash-linear-attention for other families too and then fails on a CPU.

flash-linear-attention consists of Triton kernels. Without a GPU they run in Triton's interpreter,
which needs two things, both done below before the library is imported: TRITON_INTERPRET=1 in the
environment, and an autotuner that takes its first configuration, since timing the candidates
needs a GPU driver (their results differ in rounding at most). The library's chunk kernel does not
run there, but for 64 tokens or fewer outside training it takes its fused_recurrent kernel anyway,
hence the limit on --length. Nor does flash-attn; `use_plain_attention` says what stands in for it.

Every file holds `ids` (n,), `logits` (n, n_vocab) float32 of one call over all the ids, and `made`
(how, with which versions, and how far the same model is from itself one token at a time). The
script stops when a weight is missing, unexpected or not the one on disk, and when the two ways of
running the model disagree.
"""

import argparse
import importlib.metadata
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import tiny

GOLDEN = Path(__file__).parent / "golden"
STEP_TOLERANCE = 2e-5  # one call against one token at a time; tied logits reach more than 1

#: transformers 5 keeps experts under other names than it saves them.
IN_MEMORY = {
    "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
}
#: Families of flash-linear-attention.
FLA = ("gated_deltanet", "kda")
#: Families whose cache goes by the name that attention gave it.
HYBRIDS = ("gated_deltanet", "granitemoehybrid", "bamba")

log = logging.getLogger("make_golden")


def use_triton_interpreter() -> None:
    """Let Triton kernels run on a CPU; must come before the first import of the kernels."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.autotuner import Autotuner

    # A single candidate is never timed, and timing is the part that needs a GPU.
    Autotuner.prune_configs = lambda self, kwargs: self.configs[:1]


def use_plain_attention() -> None:
    """Let flash-linear-attention's layers of attention run without flash-attn, which needs a GPU.

    Put in its place is `plain_attention`: what is kept, turned and cut into heads around it remains
    the library's own.
    """
    from fla.layers import attn

    attn.flash_attn_func = plain_attention


def plain_attention(q: Any, k: Any, v: Any, causal: bool, window_size: tuple[int, int]) -> Any:
    """flash_attn_func by its documentation, from torch's own attention: (B, T, H, D) each.

    The last row of q stands beside the last one of k. A row reads the keys up to its place, from
    `window_size[0]` before it on where that is not negative.
    """
    import torch

    assert causal and window_size[1] in (-1, 0)
    places, keys = (
        torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None],
        torch.arange(k.shape[1]),
    )
    seen = keys <= places
    if window_size[0] >= 0:
        seen &= keys >= places - window_size[0]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def versions(family: str) -> str:
    """The implementation behind a family and its versions, in words."""
    names = ["transformers", "torch"]
    how = "CPU, float32"
    if family in FLA:
        names = ["flash-linear-attention", "triton", *names]
        how = "fused_recurrent mode in Triton's interpreter, CPU, float32"
    return ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names) + f"; {how}"


def load(name: str, folder: Path) -> Any:
    """The reference model of a checkpoint, after checking each of its weights."""
    import torch
    import transformers

    tiny.write_checkpoint(name, folder)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if any(info.values()):
        raise SystemExit(f"{name}: loading was not clean: {info}")
    family = tiny.FAMILIES.get(tiny.VARIANTS[name].model_type)
    named = (lambda key: key) if family else on_disk
    memory = {named(key): value.float().numpy() for key, value in model.state_dict().items()}
    if tiny.VARIANTS[name].config["tie_word_embeddings"]:
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        if head.weight is not table.weight:
            raise SystemExit(f"{name}: the output head is not tied to the embeddings")
        memory.pop("lm_head.weight")
    disk = tiny.weights(name)
    if family:
        disk = family.in_memory(disk)
    if memory.keys() != disk.keys():
        raise SystemExit(f"{name}: other tensors in memory: {sorted(memory.keys() ^ disk.keys())}")
    for key, value in disk.items():
        if not np.array_equal(memory[key], value):
            raise SystemExit(f"{name}: {key} in memory is not the tensor on disk")
    return model.eval()


def on_disk(key: str) -> str:
    """The name under which a tensor of the model is saved."""
    for ours, theirs in IN_MEMORY.items():
        key = key.replace(ours, theirs)
    return key


def run_at_once(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits of one call over all ids, without a cache: (n,) -> (n, n_vocab)."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


def run_by_steps(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits of one call per token with the model's own cache: (n,) -> (n, n_vocab)."""
    import torch

    hybrid = model.config.model_type in (*HYBRIDS, *tiny.FAMILIES)
    key = "past_key_values" if hybrid else "cache_params"
    cache, rows = None, []
    with torch.no_grad():
        for i, token in enumerate(torch.from_numpy(ids)):
            more = {key: cache}
            if model.config.model_type == "bamba":  # which does not count what the cache holds
                more["position_ids"] = torch.tensor([[i]])
            out = model(token.reshape(1, 1), use_cache=True, **more)
            cache = getattr(out, key)
            if cache is None:
                raise SystemExit(f"{model.config.model_type} returned no cache")
            rows.append(out.logits[0, 0].numpy())
    return np.stack(rows)


def make(name: str, length: int) -> int:
    """Write one golden file and return its size in bytes."""
    ids = tiny.ids(name, length)
    with tempfile.TemporaryDirectory() as folder:
        model = load(name, Path(folder))
        logits, steps = run_at_once(model, ids), run_by_steps(model, ids)
    if not (np.isfinite(logits).all() and logits.dtype == np.float32):
        raise SystemExit(f"{name}: logits are not finite float32 numbers")
    gap = float(np.abs(logits - steps).max())
    if gap > STEP_TOLERANCE * max(1.0, float(np.abs(logits).max()) / 10):
        raise SystemExit(f"{name}: at once and by steps differ by {gap:.2e}")
    made = f"{type(model).__name__}: {versions(tiny.VARIANTS[name].model_type)}; by steps {gap:.1e}"
    path = GOLDEN / f"{name}.npz"
    np.savez_compressed(path, ids=ids, logits=logits, made=made)
    log.info("%-18s std %.2f  max %.2f  by steps %.1e", name, logits.std(), abs(logits).max(), gap)
    return path.stat().st_size


def main() -> None:
    """Read the command line and make the goldens of the chosen families."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = {variant.model_type for variant in tiny.VARIANTS.values()}
    which = f"model types, separated by commas: {', '.join(sorted(known))}"
    parser.add_argument("--family", required=True, help=which)
    parser.add_argument("--length", type=int, default=40, help="tokens per checkpoint, at most 64")
    args = parser.parse_args()
    families = args.family.split(",")
    if not known.issuperset(families) or not 1 <= args.length <= 64:
        parser.error(f"--family takes {which}; --length 1 to 64")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    if not set(families).isdisjoint(FLA):
        use_triton_interpreter()
        import fla  # noqa: F401  (registers the model type with transformers)

        use_plain_attention()
    GOLDEN.mkdir(exist_ok=True)
    names = [n for n, variant in tiny.VARIANTS.items() if variant.model_type in families]
    log.info("%d checkpoints, %d bytes", len(names), sum(make(n, args.length) for n in names))


if __name__ == "__main__":
    main()
