"""Address ranges of the charts' NetworkPolicies, IPv4 and IPv6, compared with Python's `ipaddress`."""

import ipaddress
import random
from typing import Any

import pytest

from tests.helm.rendering import Object, render

CHARTS = ("prefect-server", "prefect-work-pool")
METADATA = ["169.254.169.254", "168.63.129.16", "100.100.100.200", "fd00:ec2::254", "fe80::a9fe:a9fe"]
"""Addresses of the metadata services of AWS, GCP, Azure and Alibaba, and link-local ones."""

TAG: Object = {"image": {"tag": "src-0123456789ab"}}
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _drawn(seed: int, number: int) -> list[str]:
    """Return random address ranges, many of them near the metadata services."""
    draw = random.Random(seed)  # noqa: S311
    found: list[str] = ["0.0.0.0/0", "::/0", "fd00::/8", "168.63.0.0/16", "169.254.169.254/32", "fd00:ec2::/32"]
    while len(found) < number:
        bits = draw.choice([32, 128])
        kind: Any = ipaddress.IPv4Network if bits == 32 else ipaddress.IPv6Network
        base = int(ipaddress.ip_address(draw.choice(METADATA[:3] if bits == 32 else METADATA[3:])))
        address = draw.choice([draw.getrandbits(bits), base ^ (1 << draw.randrange(bits)), base])
        found.append(str(kind((address, draw.randint(0, bits)), strict=False)))
    return found


def _blocks(objects: list[Object]) -> list[Object]:
    return [
        to["ipBlock"]
        for policy in objects
        if policy["kind"] == "NetworkPolicy"
        for rule in policy["spec"].get("egress", [])
        for to in rule.get("to", [])
        if "ipBlock" in to
    ]


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.further) for seed in (1, 2))])
def test_exceptions_of_a_range_lie_inside_it(chart: str, seed: int) -> None:
    ranges, excepted = _drawn(seed, 60), [address for address in _drawn(seed + 100, 20) if not address.endswith("/0")]
    values = TAG | {"networkPolicy": {"egressCIDRs": ranges, "exceptCIDRs": excepted}}
    blocks = {block["cidr"]: block.get("except", []) for block in _blocks(render(chart, values))}
    assert blocks.keys() >= set(ranges)
    for cidr in ranges:
        whole = ipaddress.ip_network(cidr)
        held = [exception for exception in excepted if _is_part(ipaddress.ip_network(exception), whole)]
        assert blocks[cidr] == held, cidr


def _is_part(part: Network, whole: Network) -> bool:
    # mypy needs both networks of the same IP version.
    same: Any = whole
    return part.version == whole.version and part != whole and part.subnet_of(same)


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param({"egressCIDRs": ["0.0.0.0/0", "::/0"]}, marks=pytest.mark.further),
        {"egressCIDRs": ["168.63.0.0/16", "100.64.0.0/10", "169.0.0.0/8", "fd00::/8", "fe00::/7"]},
    ],
)
def test_no_egress_rule_reaches_a_metadata_service(chart: str, more: Object) -> None:
    policy = more | ({"api": {"cidrs": ["0.0.0.0/0", "::/0"]}} if chart == "prefect-work-pool" else {})
    for block in _blocks(render(chart, TAG | {"networkPolicy": policy})):
        for address in map(ipaddress.ip_address, METADATA):
            held = [address in ipaddress.ip_network(network) for network in (block["cidr"], *block.get("except", []))]
            assert not held[0] or any(held[1:]), (block, address)


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("https://prefect.example.com/api", 443),
        pytest.param("http://prefect.example.com/api", 80, marks=pytest.mark.further),
        pytest.param("https://prefect.example.com:8443/api", 8443, marks=pytest.mark.further),
        ("http://[fd00::1]:4200/api", 4200),
        ("", 4200),
    ],
)
def test_egress_to_an_external_api_opens_only_its_port(url: str, port: int) -> None:
    values = TAG | {"networkPolicy": {"api": {"cidrs": ["192.0.2.1/32"]}}} | ({"api": {"url": url}} if url else {})
    rules = [
        rule
        for policy in render("prefect-work-pool", values)
        if policy["kind"] == "NetworkPolicy"
        for rule in policy["spec"].get("egress", [])
        if {"ipBlock": {"cidr": "192.0.2.1/32"}} in rule.get("to", [])
    ]
    assert [rule["ports"] for rule in rules] == [[{"port": port}]] * len(rules)
    assert len(rules) >= 4
