"""The four routes: POST /get_reward, GET /health, /info and /metrics."""

import asyncio
import math
import queue
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from reinforce.serving.batcher import Batcher
from reinforce.serving.body import MAX_BODY
from reinforce.serving.connection import ANSWER_SECONDS, late
from reinforce.serving.forward import NotFiniteError
from reinforce.serving.function import FunctionError
from reinforce.serving.http import Head, HttpError, Reply, Request, json_body
from reinforce.serving.items import read
from reinforce.serving.line import LateError
from reinforce.serving.memory import is_out_of_memory
from reinforce.serving.metrics import metrics
from reinforce.serving.report import report
from reinforce.serving.reward import Reward
from reinforce.serving.server import Server

ROUTES = {"/health": "GET", "/info": "GET", "/metrics": "GET", "/get_reward": "POST"}
STALE_SECONDS = 60.0  # a forward that takes longer is taken for dead
MAX_IN_FLIGHT = 2048  # requests; fewer than connections, so that /health always has one
READERS = 4  # threads that turn bodies into items
SMALL = 4 << 10  # bytes of a body that is not worth another thread


@dataclass(frozen=True)
class Service:
    """What a warm server answers with."""

    reward: Reward
    batcher: Batcher
    clip: float | None
    advised_texts: int  # of one request, so that a slow model answers in time
    max_body: int = MAX_BODY

    def rewards(self, scores: list[float]) -> list[float]:
        """Scores standardised and clipped. Raises HttpError 500 where one is not finite."""
        rewards = [(score - self.reward.mean) / self.reward.std for score in scores]
        if self.clip is not None:
            rewards = [max(-self.clip, min(self.clip, reward)) for reward in rewards]
        if not all(map(math.isfinite, rewards)):  # a tiny --reward-std makes them so
            raise HttpError(500, "non_finite", "a reward is NaN or infinite")
        return rewards


class RewardServer(Server):
    """A server that answers 503 until it is given its service."""

    def __init__(self, address: tuple[str, int]) -> None:
        """Binds at once: a port in use raises OSError."""
        super().__init__(address)
        self._service: Service | None = None
        self._in_flight = 0
        self._readers = ThreadPoolExecutor(READERS, "reader")

    def admit(self, head: Head) -> int:
        """As `Server.admit`; strangers, who may ask for /health, send no large body."""
        length = super().admit(head)
        if head.path not in ROUTES:
            raise HttpError(404, "not_found", "try /get_reward, /health, /info or /metrics")
        if length > SMALL and head.path != "/get_reward":
            raise HttpError(413, "too_large", f"at most {SMALL} bytes for {head.path:.80}")
        return length

    @property
    def service(self) -> Service | None:
        """What it answers with; None until it is warm."""
        return self._service

    @service.setter
    def service(self, service: Service) -> None:
        self._service, self.max_body = service, service.max_body

    def route(self, request: Request) -> Reply | Coroutine[Any, Any, Reply]:
        """Answer one of the four. Raises HttpError."""
        path, service = request.head.path, self._service
        if request.head.method != ROUTES[path]:
            raise HttpError(405, "method_not_allowed", f"{path} takes {ROUTES[path]}")
        if service is None:
            raise HttpError(503, "not_ready")
        if path == "/metrics":
            return Reply(metrics(self, service.batcher), kind="text/plain; version=0.0.4")
        if self.draining or service.batcher.forward_for() > STALE_SECONDS:
            raise HttpError(503, "not_ready")
        if path == "/health":
            return Reply(json_body({"status": "ok"}))
        if path == "/info":
            return Reply(json_body(_info(service)))
        if self._in_flight >= MAX_IN_FLIGHT:
            raise _busy(service.batcher)
        return self._get_reward(service, request)

    async def _get_reward(self, service: Service, request: Request) -> Reply:
        self._in_flight += 1
        try:
            return Reply(await self._scored(service, request, time.monotonic() + ANSWER_SECONDS))
        except HttpError as error:
            return error.reply()
        except queue.Full:
            return _busy(service.batcher).reply()
        except LateError:
            return late()
        except NotFiniteError:
            reason = "the reward model gave NaN or infinity"
            return HttpError(500, "non_finite", reason).reply()
        except FunctionError as error:
            return HttpError(500, "failed", str(error)).reply()
        except Exception as error:
            if is_out_of_memory(error):
                reason = "one text alone does not fit the device"
                return HttpError(507, "out_of_memory", reason).reply()
            report(f"a request failed: {error!r}")
            return HttpError(500, "failed", "the reward model failed; see the server's log").reply()
        finally:
            self._in_flight -= 1

    async def _scored(self, service: Service, request: Request, deadline: float) -> bytes:
        reward = service.reward
        if len(request.body) <= SMALL:
            asked = read(reward, request)
        else:
            loop = asyncio.get_running_loop()
            asked = await loop.run_in_executor(self._readers, read, reward, request)
        scores: list[float] = []
        if asked.items:
            future = service.batcher.submit(asked.items, deadline, request.gone)
            scores = await asyncio.wrap_future(future)
        reply = {
            "rewards": service.rewards(scores),
            "scores": scores,
            "extra_logs": {},
            "id": asked.id,
            "model": reward.model,
            "fingerprint": reward.fingerprint,
            "truncated": asked.truncated,
        }
        return json_body(reply)


def _busy(batcher: Batcher) -> HttpError:
    after = max(1, min(10, math.ceil(batcher.expected_wait())))
    return HttpError(429, "busy", "too many texts wait for their score", after=after)


def _info(service: Service) -> dict[str, Any]:
    reward = service.reward
    return {
        "model": reward.model,
        "fingerprint": reward.fingerprint,
        "max_texts": service.advised_texts,
        "max_length": reward.max_length,
        "max_body": service.max_body,
        "reward_mean": reward.mean,
        "reward_std": reward.std,
        "reward_clip": service.clip,
    }
