"""NetworkPolicies as iptables rules.

A bridge between pods enforces no NetworkPolicy, so the node's agent turns the cluster's policies into
two chains of the mangle table, which every forwarded packet passes before kube-proxy's filter rules
and after its address translation: `NETPOL-OUT` looks at who sends, `NETPOL-IN` at who receives. The
semantics are those of the API reference (networking.k8s.io/v1): a pod that some policy selects for a
direction accepts what the rules of all its policies add up to, one that none selects accepts all;
answers to what was accepted pass; the node itself always reaches its pods.
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
    """What policies see of a pod."""

    namespace: str
    ip: str
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Protocol and number of its named ports."""

    @classmethod
    def of(cls, pod: Object) -> "Pod | None":
        """The pod, or None if no policy can apply: without an address, done, or on the node's network."""
        ip = pod.get("status", {}).get("podIP")
        done = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
        if not ip or done or pod["spec"].get("hostNetwork"):
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


def rules(policies: Iterable[Object], pods: Iterable[Object], namespaces: Iterable[Object]) -> str:
    """The input of `iptables-restore --noflush` that makes the policies so, in one transaction."""
    known = sorted(filter(None, map(Pod.of, pods)), key=lambda pod: pod.ip)
    labels = {each["metadata"]["name"]: each["metadata"].get("labels") or {} for each in namespaces}
    lines = ["*mangle", f":{INGRESS} - [0:0]", f":{EGRESS} - [0:0]"]
    every = list(policies)
    for chain, direction, own, other in ((INGRESS, "ingress", "-d", "-s"), (EGRESS, "egress", "-s", "-d")):
        lines.append(f"-A {chain} -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN")
        for pod in known:
            selecting = [policy for policy in every if _applies(policy, direction, pod)]
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
    """Each (address, ports) of iptables that the rule allows; "" stands for all."""
    peers = rule.get("from" if direction == "ingress" else "to") or []
    # A named port is the receiving pod's: this one's for ingress, each peer's for egress.
    if not peers:
        receivers: Sequence[Pod] = [pod] if direction == "ingress" else pods
        yield from (("", ports) for ports in _ports(rule, receivers[0] if direction == "ingress" else None))
        if direction == "egress":
            yield from ((each.ip, ports) for each in receivers for ports in _ports(rule, each, named_only=True))
    for peer in peers:
        if block := peer.get("ipBlock"):
            for network in _without(block["cidr"], block.get("except") or []):
                yield from ((network, ports) for ports in _ports(rule, pod if direction == "ingress" else None))
            continue
        for each in pods:
            if selects(peer.get("podSelector") or {}, each.labels) and (
                selects(peer["namespaceSelector"], labels.get(each.namespace, {}))
                if peer.get("namespaceSelector") is not None
                else each.namespace == namespace
            ):
                yield from ((each.ip, ports) for ports in _ports(rule, pod if direction == "ingress" else each))


def _ports(rule: Object, receiver: Pod | None, *, named_only: bool = False) -> Iterator[str]:
    """The rule's ports as iptables' options; named ones as the receiver has them."""
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
    """The networks that make up `cidr` less what is excepted."""
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
    """Whether a label selector selects what has these labels; an empty one selects all."""
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
