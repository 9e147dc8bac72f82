"""Translate NetworkPolicies into iptables rules.

A bridge between pods enforces no NetworkPolicy. The node's agent therefore turns the cluster's policies into two chains
of the mangle table. Every forwarded packet passes them after kube-proxy's address translation and before its filter
rules: `NETPOL-OUT` matches the sender, `NETPOL-IN` the receiver.

The semantics are those of the API reference (networking.k8s.io/v1). If policies select a pod for a direction, the pod
accepts the union of their rules. A pod that no policy selects accepts everything. Replies to accepted packets pass.
The node always reaches its pods.
"""

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

INGRESS, EGRESS = "NETPOL-IN", "NETPOL-OUT"
Object = Mapping[str, Any]
"""A Kubernetes object as the API's JSON."""


@dataclass(frozen=True)
class Pod:
    """The attributes of a pod that policies match.

    Args:
        namespace: its namespace.
        ip: its address.
        labels: its labels.
        ports: protocol and number of its named ports, by name.
    """

    namespace: str
    ip: str
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    @classmethod
    def read(cls, pod: Object) -> "Pod | None":
        """Return the pod; None if no policy applies: it has no address, has ended, or is on the node's network."""
        ip = pod.get("status", {}).get("podIP")
        has_ended = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
        if not ip or has_ended or pod["spec"].get("hostNetwork"):
            return None
        containers = [*pod["spec"].get("containers", []), *pod["spec"].get("initContainers", [])]
        ports = {
            port["name"]: (port.get("protocol", "TCP"), port["containerPort"])
            for container in containers
            for port in container.get("ports", [])
            if port.get("name")
        }
        metadata = pod["metadata"]
        return cls(metadata["namespace"], ip, metadata.get("labels") or {}, ports)


def render_rules(policies: Iterable[Object], pods: Iterable[Object], namespaces: Iterable[Object]) -> str:
    """Return the input of `iptables-restore --noflush` that enforces the policies, in one transaction."""
    known = sorted(filter(None, map(Pod.read, pods)), key=lambda pod: pod.ip)
    labels = {namespace["metadata"]["name"]: namespace["metadata"].get("labels") or {} for namespace in namespaces}
    lines = ["*mangle", f":{INGRESS} - [0:0]", f":{EGRESS} - [0:0]"]
    all_policies = list(policies)
    for chain, direction, own, other in ((INGRESS, "ingress", "-d", "-s"), (EGRESS, "egress", "-s", "-d")):
        lines.append(f"-A {chain} -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN")
        for pod in known:
            selecting = [policy for policy in all_policies if _applies(policy, direction, pod)]
            if not selecting:
                continue
            allowed = dict.fromkeys(
                match
                for policy in selecting
                for rule in policy["spec"].get(direction) or []
                for match in _matches(rule, direction, pod, policy["metadata"]["namespace"], known, labels)
            )
            for peer, ports in allowed:
                lines.append(f"-A {chain} {own} {pod.ip}{f' {other} {peer}' if peer else ''}{ports} -j RETURN")
            lines.append(f"-A {chain} {own} {pod.ip} -j DROP")
    return "\n".join([*lines, "COMMIT", ""])


def _applies(policy: Object, direction: str, pod: Pod) -> bool:
    spec = policy["spec"]
    types = spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
    return (
        policy["metadata"]["namespace"] == pod.namespace
        and direction.capitalize() in types
        and selects(spec.get("podSelector") or {}, pod.labels)
    )


def _matches(
    rule: Object, direction: str, pod: Pod, namespace: str, pods: Sequence[Pod], labels: Mapping[str, Mapping[str, str]]
) -> Iterator[tuple[str, str]]:
    """Yield the addresses and ports, as iptables' options, that a rule allows. An empty text matches all."""
    peers = rule.get("from" if direction == "ingress" else "to") or []
    # A named port belongs to the receiving pod: to this pod for ingress, to each peer for egress.
    if not peers:
        receivers: Sequence[Pod] = [pod] if direction == "ingress" else pods
        yield from (("", ports) for ports in _ports(rule, receivers[0] if direction == "ingress" else None))
        if direction == "egress":
            yield from ((peer.ip, ports) for peer in receivers for ports in _ports(rule, peer, named_only=True))
    for peer in peers:
        if block := peer.get("ipBlock"):
            for network in _without(block["cidr"], block.get("except") or []):
                yield from ((network, ports) for ports in _ports(rule, pod if direction == "ingress" else None))
            continue
        for candidate in pods:
            if selects(peer.get("podSelector") or {}, candidate.labels) and (
                selects(peer["namespaceSelector"], labels.get(candidate.namespace, {}))
                if peer.get("namespaceSelector") is not None
                else candidate.namespace == namespace
            ):
                yield from (
                    (candidate.ip, ports) for ports in _ports(rule, pod if direction == "ingress" else candidate)
                )


def _ports(rule: Object, receiver: Pod | None, *, named_only: bool = False) -> Iterator[str]:
    """Yield a rule's ports as iptables' options. The receiver resolves named ports."""
    if not rule.get("ports"):
        if not named_only:
            yield ""
        return
    for port in rule["ports"]:
        protocol, number = port.get("protocol", "TCP"), port.get("port")
        if isinstance(number, str):
            named = receiver.ports.get(number) if receiver else None
            if named and named[0] == protocol:
                yield f" -p {protocol.lower()} --dport {named[1]}"
        elif not named_only:
            last = f":{port['endPort']}" if port.get("endPort") else ""
            yield f" -p {protocol.lower()}" + (f" --dport {number}{last}" if number is not None else "")


def _without(cidr: str, excepted: Sequence[str]) -> list[str]:
    """Return the IPv4 networks of `cidr` without the excepted ones."""
    networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = [ipaddress.ip_network(cidr)]
    for hole in map(ipaddress.ip_network, excepted):
        remaining: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for network in networks:
            if hole.version == network.version and hole.subnet_of(network):  # type: ignore[arg-type]
                remaining += network.address_exclude(hole)  # type: ignore[arg-type]
            elif not (hole.version == network.version and network.subnet_of(hole)):  # type: ignore[arg-type]
                remaining.append(network)
        networks = remaining
    return [str(network) for network in networks if network.version == 4]


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Return whether a label selector matches labels. An empty selector matches all."""
    wanted: Mapping[str, str] = selector.get("matchLabels") or {}
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    for expression in selector.get("matchExpressions") or []:
        value, values = labels.get(expression["key"]), expression.get("values") or []
        holds = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[expression["operator"]]
        if not holds:
            return False
    return True
