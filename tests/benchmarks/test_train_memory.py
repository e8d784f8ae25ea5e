from pathlib import Path

from benchmarks import train_memory
from benchmarks.tables import benches
from cast_train.config import TrainConfig


def test_a_run_beside_its_plan(llama_dir: Path, text_file: Path) -> None:
    settings = ["steps=2", "block_size=32", "method=fixed", "sparsity=32:64"]
    config = TrainConfig.from_toml(None, settings)
    found = train_memory.measure(llama_dir, text_file, config)
    wanted = {"method": "fixed", "steps": 2, "block_size": 32, "sparsity": "32:64"}
    assert found["settings"] == wanted
    assert found["num_sparse"] < found["num_weights"]
    # Of a model this small the program is nearly all.
    assert found["peak_bytes"] > 0.3 * found["planned_start_bytes"] > 0
    assert found["step_s"] > 0
    found |= {"model": "tiny", "num_weights": 4_000_000}
    found |= {"peak_bytes": 3_000_000_000, "planned_step_bytes": 2_500_000_000}
    line = "| tiny | fixed | 4 | 2.50 | 3.00 | +20% | steps=2, block_size=32, "
    assert benches.train_memory([found])[-1].startswith(line)
