"""Two hosts: two network namespaces with one address each, one torchrun node in each, one run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.chain import tiny
from tests.distributed.chains import WORKER, exits, furthest, recipe
from tests.distributed.launch import ROOT, environment

pytestmark = pytest.mark.slow

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[tuple[str, str]]]:
    """(namespace, network interface) of two hosts that can only reach each other."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts need `ip` (iproute2)")
    names = [f"rpo{os.getpid()}{side}" for side in "ab"]
    links = [f"rpo{os.getpid() % 10**6}{side}" for side in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", links[0], "netns", names[0], "type", "veth",
               "peer", "name", links[1], "netns", names[1])  # fmt: skip
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, links, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_hosts_are_one(hosts: list[tuple[str, str]], one: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    tiny.write_recipe(two, recipe("ddp"))
    nodes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
             "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(number),
             "--master_addr", ADDRESSES[0], "--master_port", "29500",
             "-m", WORKER, str(two)],
            cwd=ROOT, env=environment(GLOO_SOCKET_IFNAME=link), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for number, (name, link) in enumerate(hosts)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(o[-3000:] for o in outputs)
    assert exits(two) == ["0", "0"]
    assert furthest(one, two) <= 1e-5
    assert load_file(two / "run/rpo/final/model.safetensors")
