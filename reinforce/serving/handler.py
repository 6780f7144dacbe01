"""The four routes: POST /get_reward, GET /health, /info and /metrics."""

import math
import queue
import threading
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

import torch

from reinforce.serving.batcher import Batcher, NotFiniteError
from reinforce.serving.function import FunctionError
from reinforce.serving.http import MAX_BODY, Handler, HttpError, Server, json_body
from reinforce.serving.protocol import parse_request
from reinforce.serving.reward import Reward

ANSWER_SECONDS = 50.0  # below the client's 60 s a try
STALE_SECONDS = 60.0  # a worker silent for longer is taken for dead


@dataclass(frozen=True)
class Service:
    """What a warm server answers with."""

    reward: Reward
    batcher: Batcher
    clip: float | None
    advised_texts: int  # of one request, so that a slow model answers in time


class RewardServer(Server):
    """A server that answers 503 until it is given its service."""

    def __init__(self, address: tuple[str, int]) -> None:
        """Binds at once: a port in use raises OSError."""
        self.service: Service | None = None
        self.draining = False
        self._counts: dict[int, int] = {}  # requests by status
        self._lock = threading.Lock()
        super().__init__(address, RewardHandler)

    def count(self, status: int) -> None:
        """One request was answered."""
        with self._lock:
            self._counts[status] = self._counts.get(status, 0) + 1

    def counts(self) -> list[tuple[int, int]]:
        """Requests by status so far."""
        with self._lock:
            return sorted(self._counts.items())


class RewardHandler(Handler):
    """The four routes."""

    server: RewardServer

    def route(self, method: str, path: str) -> tuple[int, str, bytes]:
        """Answer one request, counted by its status."""
        status = 500
        try:
            answer = self._route(method, path)
            status = answer[0]
            return answer
        except HttpError as error:
            status = error.status
            raise
        finally:
            self.server.count(status)

    def _route(self, method: str, path: str) -> tuple[int, str, bytes]:
        routes = {"/health": "GET", "/info": "GET", "/metrics": "GET", "/get_reward": "POST"}
        if path not in routes:
            raise HttpError(404, "not_found", "try /get_reward, /health, /info or /metrics")
        if method != routes[path]:
            raise HttpError(405, "method_not_allowed", f"{path} takes {routes[path]}")
        service = self.server.service
        if service is None:
            raise HttpError(503, "not_ready")
        if path == "/metrics":
            return 200, "text/plain; version=0.0.4", self._metrics(service)
        if path == "/get_reward":
            return 200, "application/json", self._get_reward(service)
        if self.server.draining or time.monotonic() - service.batcher.beat >= STALE_SECONDS:
            raise HttpError(503, "not_ready")
        if path == "/health":
            return 200, "application/json", json_body({"status": "ok"})
        reward = service.reward
        info = {
            "model": reward.model,
            "fingerprint": reward.fingerprint,
            "max_texts": service.advised_texts,
            "max_length": reward.max_length,
            "max_body": MAX_BODY,
            "reward_mean": reward.mean,
            "reward_std": reward.std,
            "reward_clip": service.clip,
        }
        return 200, "application/json", json_body(info)

    def _get_reward(self, service: Service) -> bytes:
        deadline = time.monotonic() + ANSWER_SECONDS
        request, reward, clip = self.read_json(), service.reward, service.clip
        items = []
        for index, text in enumerate(parse_request(request)):
            try:
                items.append(reward.encode(text))
            except Exception as error:
                reason = (
                    str(error) if isinstance(error, ValueError) else "the text cannot be encoded"
                )
                raise HttpError(422, "bad_text", reason, index) from error
        scores = self._scores(service.batcher, items, deadline) if items else []
        rewards = [(s - reward.mean) / reward.std for s in scores]
        if clip is not None:
            rewards = [max(-clip, min(clip, r)) for r in rewards]
        if not all(map(math.isfinite, rewards)):  # a tiny --reward-std makes them so
            raise HttpError(500, "non_finite", "a reward is NaN or infinite")
        reply = {
            "rewards": rewards,
            "scores": scores,
            "extra_logs": {},
            "id": request.get("id"),
            "model": reward.model,
            "fingerprint": reward.fingerprint,
        }
        return json_body(reply)

    def _scores(self, batcher: Batcher, items: list[Any], deadline: float) -> list[float]:
        if self.server.draining:
            raise HttpError(503, "draining")
        try:
            return batcher.submit(items, deadline).result(
                timeout=max(0.0, deadline - time.monotonic())
            )
        except queue.Full as error:
            raise HttpError(429, "busy", "the queue is full") from error
        except FutureTimeoutError as error:
            raise HttpError(504, "deadline", f"no score within {ANSWER_SECONDS:g} s") from error
        except NotFiniteError as error:
            raise HttpError(500, "non_finite", "the reward model gave NaN or infinity") from error
        except torch.OutOfMemoryError as error:
            raise HttpError(
                507, "out_of_memory", "one text alone does not fit the device"
            ) from error
        except FunctionError as error:
            raise HttpError(500, "failed", str(error)) from error
        except Exception as error:
            raise HttpError(
                500, "failed", "the reward model failed; see the server's log"
            ) from error

    def _metrics(self, service: Service) -> bytes:
        lines = [f'rm_requests_total{{code="{code}"}} {n}' for code, n in self.server.counts()]
        lines += [
            f"rm_forwards_total {service.batcher.forwards}",
            f"rm_texts_total {service.batcher.scored}",
        ]
        return ("# TYPE rm_requests_total counter\n" + "\n".join(lines) + "\n").encode()
