"""What a machine without a network is told, and how soon."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

import lqer.data.hub
from lqer.data.datasets import DatasetSpec, load_rows
from lqer.data.hub import hub_out_of_reach
from lqer.errors import HubError, HubTextError
from lqer.models.source import resolve_model


@pytest.fixture
def asked(monkeypatch, tmp_path) -> Iterator[list[str]]:
    """The hosts whose addresses were asked for, on a machine that finds none and has nothing cached."""
    hosts: list[str] = []

    def no_address(host, *rest):
        hosts.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr(lqer.data.hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub_out_of_reach.cache_clear()
    yield hosts
    hub_out_of_reach.cache_clear()


def test_without_a_network_a_model_of_the_hub_is_refused_after_one_question(asked):
    with pytest.raises(HubError, match=r"^model: someone/model is not a local folder, and the hub cannot be asked: "):
        resolve_model("someone/model")
    with pytest.raises(HubError, match=r"no network: huggingface\.co has no address here, and nothing is cached$"):
        resolve_model("someone/other")
    assert asked == ["huggingface.co"]


def test_without_a_network_a_text_of_the_hub_is_refused_after_one_question(asked):
    with pytest.raises(HubTextError, match=r"cannot be read: no network: huggingface\.co has no address here"):
        list(load_rows(DatasetSpec(path="someone/text"), "calibration").rows)
    assert asked == ["huggingface.co"]


def test_a_proxy_is_left_to_find_the_address(asked, monkeypatch):
    monkeypatch.setattr(lqer.data.hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub_out_of_reach() is None
    assert not constants.HF_HUB_OFFLINE
    assert not asked
