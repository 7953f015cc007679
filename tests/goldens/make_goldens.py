"""Writes tests/goldens/<case>/: what transformers computes for every case of cases.py (float32, eager attention).

    pip install torch==2.13.0 transformers==5.23.0
    python tests/goldens/make_goldens.py            # write all (or: ... CASE CASE)
    python tests/goldens/make_goldens.py --check    # compare with what is committed instead

Per case: config.json (transformers 4 dialect, from cases.py), config_v5.json (the same model as transformers 5 saves
it; both must give the same logits) and logits.npz: input_ids int32 [n_tok], logits float32 [n_tok, n_vocab] of every
position, and the versions that made them. Logits keep 17 significant bits (3e-5 on a logit of 8, the size of the
float32 error that they carry anyway), which makes the files a third smaller. Weights are not stored: see weights.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from goldens.cases import CASES
from goldens.weights import make_weights, write_hf_folder

HERE = Path(__file__).resolve().parent


def prompt(case: str, n_tok: int, n_vocab: int) -> npt.NDArray[np.int32]:
    stream = np.random.RandomState(zlib.crc32(f"{case}/input_ids".encode()))
    return (stream.random_sample(n_tok) * n_vocab).astype(np.int32)


def transformers_logits(folder: Path, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Logits [n_tok, n_vocab] of one forward pass over `ids`; every weight must come from the folder."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    missing = {name for name in info["missing_keys"] if not (model.config.tie_word_embeddings and name == "lm_head.weight")}
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise SystemExit(f"{folder}: the weights do not match the model: {info}")
    with torch.no_grad():
        out = model.eval()(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]
    result: npt.NDArray[np.float32] = out.numpy()
    return result


def keep_17_bits(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    bits = x.view(np.uint32)
    return ((bits + np.uint32(1 << 6)) & np.uint32(0xFFFFFF80)).view(np.float32)


def make_case(case: str, *, check: bool) -> str:
    """Makes or checks one case; returns a line about it."""
    folder = HERE / case
    spec = CASES[case]
    ids = prompt(case, spec.n_tok, spec.config["vocab_size"])
    with tempfile.TemporaryDirectory() as tmp:
        if not check:
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(spec.config, indent=2) + "\n")
            transformers.AutoConfig.from_pretrained(folder).save_pretrained(tmp)
            (folder / "config_v5.json").write_text((Path(tmp) / "config.json").read_text())
        logits = transformers_logits(write_hf_folder(folder, Path(tmp) / "v4", "f32"), ids)
        v5 = write_hf_folder(folder, Path(tmp) / "v5", "bf16", shards=2, config_name="config_v5.json")
        if not np.array_equal(logits, transformers_logits(v5, ids)):
            raise SystemExit(f"{case}: config.json and config_v5.json give different logits")
    if check:
        golden = np.load(folder / "logits.npz")
        worst = float(np.abs(golden["logits"] - logits).max())
        if not np.array_equal(golden["input_ids"], ids) or worst > 1e-3:
            raise SystemExit(f"{case}: the committed golden differs, by {worst:.2e} at most")
        return f"{case:30s} worst difference {worst:.1e}"
    np.savez_compressed(
        folder / "logits.npz",
        input_ids=ids,
        logits=keep_17_bits(logits),
        transformers=np.array(transformers.__version__),
        torch=np.array(torch.__version__.split("+")[0]),
    )
    n_weight = sum(x.size for x in make_weights(spec.config, case).values())
    size = (folder / "logits.npz").stat().st_size
    return f"{case:30s} {n_weight / 1e6:5.2f}M weights, logits sd {logits.std():4.2f}, {size} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help="only these cases")
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for case in args.case or CASES:
        print(make_case(case, check=args.check), flush=True)


if __name__ == "__main__":
    main()
