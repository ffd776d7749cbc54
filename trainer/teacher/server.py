"""A teacher that is somewhere else: asked over HTTP, in the thread that reads data, ahead of the ranks' computing."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from trainer.config.distill import ServerConfig
from trainer.errors import ConfigError
from trainer.knowledge import TEACHER_IDS, TEACHER_LOG_PROBABILITIES, Knowledge, SparseTargets
from trainer.records import IntArray
from trainer.teacher.dialects import AnswerError, Dialect, OpenAiDialect, Predictions, VllmDialect
from trainer.teacher.http import PATH, JsonClient, ServerFailedError, ServerRefusedError
from trainer.teacher.prompts import Prompt, prompts_of
from trainer.teacher.spellings import disagreement, probe_ids, spellings_like

logger = logging.getLogger(__name__)

_SHORT_PROBE = 32
_ENOUGH = 8

_POSITIONS = (
    "a server cannot let attention cross documents while positions restart; use `join` or, as the teacher learned to "
    "read documents one by one, `block`"
)


class ServerTeacher:
    """The teacher behind `distill.teacher.server`. Each rank asks for its own samples."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        tokenizer: Path,
        vocabulary: int,
        boundaries: Literal["join", "positions", "block"],
        environment: Mapping[str, str] = os.environ,
        pause: Callable[[float], object] | None = None,
    ):
        """Asks nothing yet.

        Args:
            tokenizer: folder of the run's tokenizer, which has to be the teacher's too.
            vocabulary: its size; what a teacher says of tokens from this one on is left out.
            environment: where the key is.
            pause: see :class:`JsonClient`.

        Raises:
            ConfigError: `data.boundaries` asks for what no server can, the address is none, or the key is missing.
        """
        if boundaries == "positions":
            raise ConfigError([("data.boundaries", _POSITIONS)])
        self._config = config
        self._vocabulary = vocabulary
        self._top = min(config.top, vocabulary)
        self._tokenizer_file = tokenizer / "tokenizer.json"
        self._dialect: Dialect | None = VllmDialect() if config.dialect == "vllm" else None
        self._settling = threading.Lock()
        self._warned = False
        self._client = JsonClient(config, environment=environment, pause=pause)
        self._threads = ThreadPoolExecutor(config.requests, thread_name_prefix="teacher-server")

    def check(self, sequence_length: int) -> None:
        """Ask the server what a run needs of it: once, while a run is prepared.

        Raises:
            ConfigError: it does not answer, has no such model, gives no or too few log-probabilities, or reads tokens
                otherwise than the run.
        """
        try:
            self._check_model(sequence_length)
            tokenizer = Tokenizer.from_file(str(self._tokenizer_file))
            probe = probe_ids(tokenizer, sequence_length)
            found = self._predict_with(self._settled(), probe)
            if found.offered < self._top:
                raise ConfigError(
                    [
                        (
                            f"{PATH}.top",
                            f"{self._top} tokens asked for at each position, and {self._client.url} gives "
                            f"{found.offered}; lower it, or raise the server's limit (vLLM: --max-logprobs)",
                        )
                    ]
                )
            self._check_spelling(tokenizer, probe, self._texts_of(probe, found))
        except AnswerError as error:
            raise ConfigError(
                [(f"{PATH}.dialect", f"{self._client.url} does not answer as {self._config.dialect} does: {error}")]
            ) from error
        except (ServerRefusedError, ServerFailedError) as error:
            raise ConfigError([(PATH, str(error))]) from error

    def annotate(
        self,
        ids: IntArray,  # noqa: ARG002
        arrays: Mapping[str, IntArray],
    ) -> dict[str, NDArray[Any]]:
        """What the server predicts at each position that has a label; −1 and −inf elsewhere and where fewer came.

        Raises:
            ServerFailedError: it gives no answer.
            ServerRefusedError: it refuses, or answers something else.
        """
        input_ids = arrays["input_ids"]
        shape = (*input_ids.shape, self._top)
        tokens = np.full(shape, -1, dtype=np.int64)
        log_probabilities = np.full(shape, -np.inf, dtype=np.float32)
        prompts = prompts_of(input_ids, arrays.get("position_ids"), arrays.get("labels"))
        try:
            dialect = self._settled()
            # map gives the answers in the order of the prompts, and after an error asks for no more of them
            answers = self._threads.map(lambda prompt: self._predict(dialect, prompt, input_ids), prompts)
            for prompt, answer in zip(prompts, answers, strict=True):
                tokens[prompt.row, prompt.begin : prompt.end] = answer.ids
                log_probabilities[prompt.row, prompt.begin : prompt.end] = answer.log_probabilities
                self._tell_of_fewer(answer)
        except AnswerError as error:
            raise ServerRefusedError(f"{self._client.url} does not answer what it was asked: {error}") from error
        return {TEACHER_IDS: tokens, TEACHER_LOG_PROBABILITIES: log_probabilities}

    def knowledge(self, tensors: Mapping[str, Tensor]) -> Knowledge:
        """What :meth:`annotate` brought. A micro-batch without it, which the student wrote itself, is asked for now."""
        if TEACHER_IDS in tensors:
            ids, log_probabilities = tensors[TEACHER_IDS], tensors[TEACHER_LOG_PROBABILITIES]
        else:
            names = ("input_ids", "position_ids", "labels")
            arrays = {name: tensors[name].cpu().numpy() for name in names if name in tensors}
            device = tensors["input_ids"].device
            found = self.annotate(np.empty(0, dtype=np.int64), arrays)
            ids = torch.from_numpy(found[TEACHER_IDS]).to(device)
            log_probabilities = torch.from_numpy(found[TEACHER_LOG_PROBABILITIES]).to(device)
        return Knowledge(SparseTargets(ids, log_probabilities, "top"))

    def mend(self) -> str | None:
        """Nothing of the teacher is here."""
        return None

    def close(self) -> None:
        """Give up what is asked; whoever waits for it gets a :class:`ServerFailedError`."""
        self._client.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _predict(self, dialect: Dialect, prompt: Prompt, input_ids: IntArray) -> Predictions:
        return self._predict_with(dialect, input_ids[prompt.row, prompt.begin : prompt.end].tolist())

    def _predict_with(self, dialect: Dialect, prompt: list[int]) -> Predictions:
        body = {"model": self._config.model, **dialect.body(prompt, self._top)}
        return dialect.read(self._client.post("/completions", body), prompt, self._top, self._vocabulary)

    def _settled(self) -> Dialect:
        """The dialect; a server in the OpenAI format is asked once how it spells tokens.

        Raises:
            ConfigError: it spells them otherwise than the run's tokenizer.
        """
        with self._settling:
            if self._dialect is None:
                tokenizer = Tokenizer.from_file(str(self._tokenizer_file))
                probe = probe_ids(tokenizer, _SHORT_PROBE)
                texts = self._predict_with(OpenAiDialect(), probe).texts
                if all(text is None for text in texts):
                    self._dialect = OpenAiDialect()
                else:
                    self._check_spelling(tokenizer, probe, texts)
                    self._dialect = OpenAiDialect(spellings_like(tokenizer, probe, texts), as_ids=False)
            return self._dialect

    def _check_model(self, sequence_length: int) -> None:
        answer = self._client.get("/models")
        try:
            models = {str(model["id"]): model for model in answer["data"]}
        except (TypeError, KeyError) as error:
            raise ConfigError(
                [(f"{PATH}.url", f"{self._client.url}/models lists no models: is the address complete (…/v1)?")]
            ) from error
        if self._config.model not in models:
            there = ", ".join(sorted(models)[:10]) or "none"
            raise ConfigError(
                [(f"{PATH}.model", f"{self._client.url} has no model {self._config.model!r}; there: {there}")]
            )
        # vLLM tells the longest sequence; the token that is generated needs a place in it
        longest = models[self._config.model].get("max_model_len")
        if isinstance(longest, int) and longest < sequence_length + 1:
            raise ConfigError(
                [
                    (
                        "data.sequence_length",
                        f"{sequence_length} tokens and one more do not fit the {longest} of {self._config.model} at "
                        f"{self._client.url}; shorten it, or serve it with a longer --max-model-len",
                    )
                ]
            )

    def _texts_of(self, probe: list[int], found: Predictions) -> list[str | None]:
        if self._config.dialect == "openai" and all(text is None for text in found.texts):
            return self._predict_with(OpenAiDialect(as_ids=False), probe).texts
        return found.texts

    def _check_spelling(self, tokenizer: Tokenizer, probe: list[int], texts: list[str | None]) -> None:
        compared, difference = disagreement(tokenizer, probe, texts)
        if difference is not None:
            raise ConfigError(
                [
                    (
                        f"{PATH}.model",
                        f"{self._config.model} at {self._client.url} has another tokenizer than the run: {difference}; "
                        "set data.tokenizer.path to the teacher's",
                    )
                ]
            )
        if compared == 0:
            logger.warning(
                "%s does not tell the text of its tokens: whether it has the run's tokenizer was not checked",
                self._client.url,
            )

    def _tell_of_fewer(self, answer: Predictions) -> None:
        # in a few tokens it may seem so by chance
        if answer.offered < self._top and len(answer.ids) >= _ENOUGH and not self._warned:
            self._warned = True
            logger.warning(
                "%s gives %d tokens at a position, not the %d of %s.top: the rest counts as unknown",
                self._client.url,
                answer.offered,
                self._top,
                PATH,
            )
