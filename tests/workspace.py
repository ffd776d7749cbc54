"""A small run in its own folder, started as a user starts it: commands, files, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.numpy import load_file

SECONDS = 240


@dataclass
class Workspace:
    """A folder with a config, its data and its runs."""

    root: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    def run_dir(self, name: str) -> Path:
        return self.root / "runs" / name

    def start(self, *argv: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            argv,
            cwd=self.root,
            env=os.environ
            | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
            | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def call(self, *argv: str, **environment: str) -> tuple[int, str]:
        """Exit code and output of a command."""
        process = self.start(*argv, **environment)
        output, _ = process.communicate(timeout=SECONDS)
        return process.returncode, output

    def trimtab(self, *arguments: str) -> tuple[int, str]:
        return self.call(sys.executable, "-m", "launcher.cli", *arguments)

    def outcome(self, name: str) -> dict[str, object]:
        result: dict[str, object] = json.loads((self.run_dir(name) / "outcome.json").read_text())
        return result

    def ledger(self, name: str) -> list[dict[str, object]]:
        lines = (self.run_dir(name) / "ledger.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def final_state(self, name: str) -> dict[str, bytes]:
        """Every tensor of every rank in the newest checkpoint, as bytes."""
        newest = sorted((self.run_dir(name) / "checkpoints").glob("step-*"))[-1]
        return {
            f"{shard.name}/{key}": value.tobytes()
            for shard in sorted(newest.glob("*.safetensors"))
            for key, value in load_file(shard).items()
        } | {"step": newest.name.encode()}

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


SENTENCES = (
    "the trim tab is a small surface on a rudder",
    "a large ship is kept on course by a small force",
    "every gradient is looked at before it is applied",
    "what was never seen cannot be learned from",
)


def make_workspace(root: Path) -> Workspace:
    texts = root / "texts"
    texts.mkdir(parents=True)
    for index in range(48):
        body = "\n".join(
            f"{SENTENCES[(index + line) % 4]}, note {index * 31 + line * 7} of {line}" for line in range(12)
        )
        (texts / f"{index:02d}.txt").write_text(body)
    (root / "config.yaml").write_text(
        textwrap.dedent(
            """
            name: small
            seed: 3
            precision: fp32
            data:
              sources: [{files: [texts/*.txt]}]
              clean: {near_duplicates: null}
              tokenizer: {train: {vocabulary: 384}}
              sequence_length: 32
              held_out: 0.1
            model:
              config:
                model_type: gpt2
                n_embd: 32
                n_layer: 2
                n_head: 2
                n_positions: 32
                resid_pdrop: 0.1
                embd_pdrop: 0.1
                attn_pdrop: 0.1
            batch: {samples: 8, micro: 2}
            optim: {lr: 3.0e-3}
            schedule: {duration: 30, warmup: 5}
            zero: {stage: 2}
            evaluation: {every: 10}
            checkpoint: {every: 10}
            telemetry: {weights_every: 10}
            cluster: {ranks_per_node: 2, device: cpu}
            """
        )
    )
    return Workspace(root)
