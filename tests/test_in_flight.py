"""The request for rewards is on its way while the reference scores."""

import threading

import pytest
from conftest import metrics, small_flags, train_here
from test_client import INFO, reply

from reinforce.run.actor import Actor
from reinforce.run.in_flight import in_flight


def test_what_the_work_returns_or_raises_is_the_result():
    assert in_flight(lambda: 7).result() == 7
    with pytest.raises(ValueError, match="no such"):
        in_flight(raising).result()


def raising():
    raise ValueError("no such")


def test_the_server_need_not_answer_before_the_reference_has_scored(small, server, tmp_path, monkeypatch):
    """It answers each request of the run only when the reference has scored after it had arrived."""
    scored, late = threading.Semaphore(0), []
    score = Actor.reference_logp

    def noted(actor, rollout):
        logp = score(actor, rollout)
        scored.release()
        return logp

    def answer(post, connection):
        texts = post.get("query") or post["messages"]
        if len(texts) > 1 and not scored.acquire(timeout=20):
            late.append(len(texts))
        rewards = [float(len(str(text))) for text in texts]
        return reply({"rewards": rewards, "id": post["id"], "fingerprint": INFO["fingerprint"]})

    monkeypatch.setattr(Actor, "reference_logp", noted)
    flags = [str(word) for word in small_flags(small, server(answer, info={**INFO, "max_texts": 64}).port)]
    at = flags.index("--val-data")
    done = train_here(*flags[:at], *flags[at + 2 :], "--max-steps", "2", "--log-dir", tmp_path / "run")
    assert done.returncode in (0, None) and not late, done.stdout
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
