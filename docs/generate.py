"""Write the generated parts of the reference pages: `make docs`.

A page is text with blocks between `<!-- begin NAME -->` and `<!-- end NAME -->`. `BLOCKS` says which function makes the
block of that name. The text around the blocks is written by hand.
"""

import argparse
import ast
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestration.settings import ROOT

REFERENCE = ROOT / "docs" / "reference"

Object = dict[str, Any]

NOTE = "`make docs` writes this part from {}. Change it there."

COMMON_TEXTS = {
    "image": "Another image for this component.",
    "pullPolicy": "When the kubelet pulls the image.",
    "settings": "Prefect settings by name. They win over the top-level `settings`.",
    "env": "Environment variables, as in a container.",
    "envFrom": "Whole ConfigMaps and Secrets as environment variables.",
    "resources": "Requests and limits of the main container.",
    "pod": "The keys of the top-level `pod`, for this component alone. They win.",
    "labels": "More labels.",
    "annotations": "More annotations.",
    "commonAnnotations": "Annotations of every object.",
    "nodeSelector": "Labels that a node must have.",
    "tolerations": "Taints that the pods tolerate.",
    "affinity": "Affinity to nodes and pods.",
    "topologySpreadConstraints": "How the pods spread over zones and nodes.",
    "priorityClassName": "The PriorityClass.",
    "runtimeClassName": "The RuntimeClass.",
    "hostAliases": "More lines of /etc/hosts.",
    "dnsPolicy": "The pod's DNS policy.",
    "dnsConfig": "The pod's DNS options.",
    "volumes": "More volumes.",
    "volumeMounts": "More mounts of the main container.",
    "securityContext": "The pod's security context.",
    "replicas": "How many pods.",
    "args": "Arguments that replace those of the command.",
    "extraArgs": "Arguments that are added to those of the command.",
    "lifecycle": "The container's lifecycle hooks.",
    "strategy": "The Deployment's update strategy.",
    "revisionHistoryLimit": "How many old ReplicaSets stay.",
    "startupProbe": "Times of the startup probe.",
    "livenessProbe": "Times of the liveness probe.",
    "readinessProbe": "Times of the readiness probe.",
    "terminationGracePeriodSeconds": "Seconds between SIGTERM and SIGKILL.",
    "activeDeadlineSeconds": "Seconds that the Job may take.",
    "backoffLimit": "How often Kubernetes retries the Job's pod.",
    "autoscaling.enabled": "Create a HorizontalPodAutoscaler.",
    "autoscaling.minReplicas": "The fewest pods.",
    "autoscaling.maxReplicas": "The most pods.",
    "autoscaling.targetCPUUtilizationPercentage": "The CPU use to aim at, in percent of the request.",
    "autoscaling.behavior": "How fast to scale up and down.",
    "podDisruptionBudget": "The PodDisruptionBudget: `enabled`, and one of `minAvailable` and `maxUnavailable`.",
    "podDisruptionBudget.enabled": "Create a PodDisruptionBudget.",
    "podDisruptionBudget.minAvailable": "How many pods must stay: a number or a percentage.",
    "podDisruptionBudget.maxUnavailable": "How many pods may be away: a number or a percentage.",
    "serviceAccount.create": "Create the ServiceAccount.",
    "serviceAccount.name": "The name of the ServiceAccount that is created, or of an existing one.",
    "rbac.create": "Create the Role.",
    "rbac.extraRules": "More rules of the Role.",
    "auth.enabled": "Ask for a password.",
    "auth.key": "The key in the Secret.",
    "oidc.clientId": "The id of the client at the identity provider. Required.",
    "oidc.image": "An image of oauth2-proxy 7.15.",
    "pool.description": "The pool's description in the UI.",
    "drift.enabled": "Run the component.",
    "reconciler.enabled": "Run the component.",
    "ingress.enabled": "Create an Ingress.",
    "ingress.className": "The IngressClass.",
    "httpRoute.enabled": "Create an HTTPRoute of the Gateway API.",
    "httpRoute.hostnames": "The route's host names.",
    "tag": "The image's tag.",
    "digest": "The image's digest. It wins over the tag.",
    "maxOverflow": "Connections beyond `poolSize` that each process may open under load.",
    "serverTLS": (
        "TLS to an external database. `mode` is disable, allow, prefer, require, verify-ca or verify-full. "
        "Empty: `ssl` of the URL, else prefer. verify-ca and verify-full need `caSecret`, a Secret with the CA's "
        "certificate in the key `caKey`."
    ),
    "tls.enabled": "Serve TLS.",
    "renewBefore": "How long before the certificate's end cert-manager renews it.",
    "tls.caKey": "The key in the Secret.",
    "bundled.uid": "The numeric user and group of the image.",
    "bundled.existingSecret": (
        "An existing Secret with the key `password`. Empty: the chart generates a Secret, and upgrades keep it."
    ),
    "bundled.pod": (
        "The keys of the top-level `pod`, whose labels, annotations, containers, volumes, user and group this pod does "
        "not take."
    ),
    "storage.size": "The size of the volume.",
    "volume.size": "The size of the volume.",
    "archive.region": "The bucket's region, for S3. Empty: the service's default.",
    "archive.resources": "Requests and limits of the plugin's container in each pod of the database.",
    "service.type": "The Service's type.",
    "service.port": "The Service's port.",
    "service.nodePort": "The node port, for the types NodePort and LoadBalancer.",
    "service.clusterIP": "A fixed address in the cluster.",
    "service.loadBalancerClass": "The load balancer's class.",
    "service.loadBalancerSourceRanges": "Addresses that the load balancer lets in.",
    "service.externalTrafficPolicy": "`Local` keeps the clients' addresses.",
    "service.sessionAffinity": "`ClientIP` sends a client to the same pod.",
    "service.ipFamilyPolicy": "SingleStack, PreferDualStack or RequireDualStack.",
    "service.ipFamilies": "The IP families.",
    "service.extraPorts": "More ports of the Service.",
    "api.port": "The port of the Prefect API's pods.",
    "api.cidrs": "Addresses of a Prefect API outside of the cluster.",
    "api.namespaceLabels": "Labels of the namespace with the API's pods. Empty: the release's namespace.",
    "api.podLabels": "Labels of the API's pods.",
    "dns.namespaceLabels": "Labels of the namespace with the cluster's DNS pods.",
    "dns.podLabels": "Labels of the cluster's DNS pods.",
    "networkPolicy.kubernetesPorts": "The ports of the Kubernetes API.",
    "networkPolicy.exceptCIDRs": "Addresses that runs may not reach: the cloud's metadata service.",
    "tests.pod": "The keys of the top-level `pod`, for the pod of `helm test`.",
}
"""Texts of keys without a comment in values.yaml, by the end of their names. The longest matching end wins."""

REASONS = {
    "worker": {
        "jobs create": "Create the Job of a claimed run.",
        "jobs get": "Find the Job that an unanswered request has created.",
        "jobs list": "Find the Jobs of runs.",
        "jobs watch": "Learn that a Job has ended.",
        "jobs patch": "Label the Job of a warm pod with its run.",
        "jobs delete": "Delete the Job of a cancelled run.",
        "pods list": "Find the pods of runs.",
        "pods watch": "Learn that a pod has started or ended.",
        "pods patch": "Label a warm pod with its run, and hand the run over.",
        "pods/log get": "Read the log of a pod that crashed before it could report.",
        "namespaces get": "Read the UID of kube-system, which identifies the cluster.",
    },
    "reconciler": {
        "jobs list": "Read the Jobs of runs in each round.",
        "jobs watch": "Make rounds at the usual interval again once a run has a Job.",
        "jobs patch": "Annotate a Job whose ended pods are recorded.",
        "jobs delete": "Delete Jobs of cancelled, finished and deleted runs.",
        "pods list": "Read the pods of runs in each round.",
        "pods watch": "Start a round as soon as a pod fails or is deleted.",
        "pods deletecollection": "Kill what still runs of a crashed run.",
        "pods/log get": "Read the last lines of a crashed run's log.",
        "events list": "Read why a volume cannot be mounted or a pod cannot be created.",
        "leases create": "Create the Lease of the leader election.",
        "leases get": "Read who the leader is.",
        "leases update": "Take, renew and release the Lease.",
        "namespaces get": "Read the UID of kube-system, which identifies the cluster.",
    },
}
"""Reasons for permissions, by component and "RESOURCE VERB"."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def code(value: object) -> str:
    """Return a value in backquotes. An empty value stays empty."""
    return f"`{value}`" if str(value) else ""


def sentence(text: str) -> str:
    """Return a comment as a sentence, with braces and URLs in backquotes."""
    # Leave text in backquotes alone.
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    for number, part in enumerate(parts[::2]):
        parts[2 * number] = re.sub(r"\[\{.*\}\]|\{\{.*?\}\}|\{[^{}]*\}|[a-z+]+://[^\s,;)]*", r"`\g<0>`", part)
    joined = "".join(parts)
    return joined[:1].upper() + joined[1:] + ("." if joined and joined[-1] != "." else "")


# Values of the charts


def _comments(lines: list[str], number: int) -> str:
    """Return the comment directly above a line."""
    first = number
    while first and re.match(r"\s*#", lines[first - 1]):
        first -= 1
    # Indented text in a comment is an example.
    examples = (re.sub(r"^\s*# {2,}(.*)", r"`\1`.", line) for line in lines[first:number])
    return " ".join(re.sub(r"^\s*# ?(-- )?", "", example) for example in examples)


def _flow(value: Any) -> str:
    """Return a value as it would be written on one line."""
    if isinstance(value, str):
        is_plain = re.fullmatch(r"[\w/][\w./:-]*", value) and yaml.safe_load(value) == value
        return value if is_plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return json.dumps(value)


class Schema:
    """Reads the types of keys from a chart's values.schema.json."""

    def __init__(self, schema: Object) -> None:
        self._schema = schema

    def definition(self, rule: Object) -> str:
        """Return the name of the definition that a rule refers to, or an empty text."""
        return str(rule.get("$ref", "")).rpartition("/")[2]

    def resolved(self, rule: Object) -> Object:
        """Return the rule that a reference leads to."""
        found: Object = self._schema["$defs"][self.definition(rule)] if "$ref" in rule else rule
        return found

    def type_of(self, rule: Object) -> str:
        """Return the type of a key's values in words."""
        name, found = self.definition(rule), self.resolved(rule)
        if "enum" in found:
            return " or ".join(code(_flow(choice)) for choice in found["enum"])
        if "type" not in found and (either := found.get("oneOf", found.get("anyOf"))):
            return " or ".join(dict.fromkeys(map(self.type_of, either)))
        if "type" not in found and "allOf" in found:
            return self.type_of(found["allOf"][0])
        types = found.get("type", "any")
        kinds = [types] if isinstance(types, str) else list(types)
        if kinds == ["array"]:
            item = self.type_of(found["items"]) if "items" in found else ""
            return f"list of {item}" if item else "list"
        if name and kinds != ["object"]:
            words = re.sub(r"([A-Z])", lambda match: f" {match[1].lower()}", name)
            return "string" if words == "reference" else words
        text = " or ".join(kinds)
        if name and name not in ("settings", "labels", "annotations"):
            return "labels" if name.endswith("Labels") else name
        low, high = found.get("minimum"), found.get("maximum")
        if high is not None and high < 2**31 - 1 and "integer" in kinds:
            return f"{text}, {low} to {high}"
        return text


def values(chart: str) -> str:
    """Return the tables of a chart's values: a section for each component, a row for each key."""
    source = (ROOT / "helm" / chart / "values.yaml").read_text()
    schema_text = json.loads((ROOT / "helm" / chart / "values.schema.json").read_text())
    schema, lines = Schema(schema_text), source.splitlines()
    general: list[list[str]] = []
    sections: list[tuple[str, str, list[list[str]]]] = []

    def rows(node: yaml.MappingNode, rule: Object, path: str) -> Iterator[list[str]]:
        for key, value in node.value:
            name = f"{path}.{key.value}" if path else key.value
            found = schema.resolved(rule)["properties"][key.value]
            text = _comments(lines, key.start_mark.line)
            known = schema.definition(found)
            opens = isinstance(value, yaml.MappingNode) and bool(value.value) and not value.flow_style
            opens = opens and "properties" in schema.resolved(found) and known in ("", "image", "podDisruptionBudget")
            if opens:
                assert isinstance(value, yaml.MappingNode)
                if text:
                    yield [code(name), "object", "", sentence(text)]
                yield from rows(value, found, name)
            else:
                default = yaml.safe_load(yaml.serialize(value))
                yield [code(name), schema.type_of(found), code(_flow(default)), sentence(text) or _common_text(name)]

    root = yaml.compose(source)
    assert isinstance(root, yaml.MappingNode)
    for key, value in root.value:
        rule = schema_text["properties"][key.value]
        if isinstance(value, yaml.MappingNode) and value.value:
            intro = textwrap.fill(sentence(_comments(lines, key.start_mark.line)), 120, break_on_hyphens=False)
            sections.append((key.value, intro, list(rows(value, rule, key.value))))
        else:
            only = yaml.MappingNode(root.tag, [(key, value)], flow_style=False)
            general += rows(only, schema_text, "")
    head = ("Key", "Type", "Default", "Meaning")
    text = f"## General\n\n{table(head, general)}"
    for name, intro, found in sections:
        text += f"\n## {name}\n\n" + (f"{intro}\n\n" if intro else "") + table(head, found)
    return f"{NOTE.format(f'helm/{chart}/values.yaml and values.schema.json')}\n\n{text}"


def _common_text(name: str) -> str:
    """Return the text of COMMON_TEXTS for a key without a comment.

    Raises:
        LookupError: COMMON_TEXTS has no text for the key.
    """
    parts = name.split(".")
    for number in range(len(parts)):
        if text := COMMON_TEXTS.get(".".join(parts[number:])):
            return text
    raise LookupError(f"{name} has no comment in values.yaml, and docs/generate.py no text for it. Add a comment.")


# Commands


def commands() -> str:
    """Return a section for each subcommand of `orchestrate`, with its arguments."""
    from orchestration.__main__ import parser

    [chosen] = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    helps = {action.dest: action.help or "" for action in chosen._choices_actions}
    text = f"{NOTE.format('orchestration/__main__.py')}\n"
    for name, command in chosen.choices.items():
        shown = [action for action in command._actions if not isinstance(action, argparse._HelpAction)]
        # An argument and its value stay on one line.
        words = ["orchestrate", name, *(_usage(action).replace(" ", "\0") for action in shown)]
        usage = textwrap.fill(" ".join(words), 100, subsequent_indent="    ", break_on_hyphens=False)
        usage = usage.replace("\0", " ")
        text += f"\n### orchestrate {name}\n\n{sentence(helps[name])}\n\n```text\n{usage}\n```\n"
        rows = [
            [code(_form(action)), _default(action), sentence(action.help or _common_option(action))] for action in shown
        ]
        text += f"\n{table(('Argument', 'Default', 'Meaning'), rows)}" if rows else ""
    return text


def _common_option(action: argparse.Action) -> str:
    """Return the common text of an argument without a help text.

    Raises:
        LookupError: the argument has no common text.
    """
    if action.dest == "every":
        return "seconds between two rounds"
    raise LookupError(f"{_form(action)} has no help text. Add one in orchestration/__main__.py.")


def _metavar(action: argparse.Action) -> str:
    return str(action.metavar or action.dest.upper()) if action.nargs != 0 else ""


def _form(action: argparse.Action) -> str:
    return " ".join(filter(None, [*action.option_strings[:1], _metavar(action)]))


def _usage(action: argparse.Action) -> str:
    repeated = {"*": f"[{_metavar(action)}...]", "+": f"{_metavar(action)}..."}
    if not action.option_strings and action.nargs in repeated:
        return repeated[str(action.nargs)]
    return _form(action) if action.required else f"[{_form(action)}]"


def _default(action: argparse.Action) -> str:
    if action.required or action.nargs == 0 or action.default in (None, "") or action.dest == "identity":
        return ""
    return code(f"{action.default:g}" if isinstance(action.default, float) else str(action.default))


def targets() -> str:
    """Return a table of make's targets for each of their groups."""
    text = f"{NOTE.format('the Makefile')}\n"
    rows: list[list[str]] = []
    for line in (ROOT / "Makefile").read_text().splitlines():
        if group := re.match(r"##@ (.*)", line):
            text += table(("Target", "What it does"), rows) if rows else ""
            text += f"\n### {group[1]}\n\n"
            rows = []
        elif target := re.match(r"([a-z-]+):.*?## (.*)", line):
            rows.append([code(f"make {target[1]}"), sentence(target[2])])
    return text + table(("Target", "What it does"), rows)


# Settings, metrics


def settings_table() -> str:
    """Return the table in the docstring of orchestration/settings.py."""
    from orchestration import settings

    lines = [line for line in (settings.__doc__ or "").splitlines() if line.startswith("|")]
    return NOTE.format("orchestration/settings.py") + "\n\n" + "\n".join(lines) + "\n"


KINDS = {"Counter": "counter", "Gauge": "gauge", "Histogram": "histogram", "Summary": "summary"}


def metrics() -> str:
    """Return a table of the metrics that the code registers."""
    rows = []
    for path in sorted((ROOT / "orchestration").rglob("*.py")):
        source = path.read_text()
        if "prometheus_client" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            kind = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            if kind in KINDS and isinstance(node, ast.Call) and len(node.args) >= 2:
                name, text, *labels = (ast.literal_eval(argument) for argument in node.args)
                component = "drift" if name.startswith("desired_state") else path.parent.name
                labelled = ", ".join(map(code, labels[0])) if labels else ""
                rows.append([code(name), KINDS[kind], component, labelled, sentence(text)])
    head = ("Metric", "Type", "Component", "Labels", "Meaning")
    return NOTE.format("the code that registers the metrics") + "\n\n" + table(head, sorted(rows))


# RBAC


def rbac() -> str:
    """Return tables of the Kubernetes permissions of each component, from the rendered charts.

    Raises:
        MissingProgramError: helm is not installed and cannot be built.
    """
    # Imported here, as only this page needs helm and the test dependencies.
    from tests.helm.rendering import render

    tag = {"image": {"tag": "1"}}
    charts = ("prefect-server", "prefect-work-pool")
    production = ROOT / "helm" / "environments" / "production"
    # The scope of each Role is plain only where runs are in another namespace.
    elsewhere = {"namespace": "runs"}
    default = render("prefect-server", tag, "prefect-server")
    default += render("prefect-work-pool", tag | {"runs": elsewhere}, "prefect-work-pool")
    with_values = []
    for chart in charts:
        values = yaml.safe_load((production / f"{chart}.yaml").read_text()) | tag
        if chart == "prefect-work-pool":
            values["runs"] |= elsewhere
        with_values += render(chart, values, chart)
    alone = tag | {"runs": elsewhere, "reconciler": {"enabled": False}}
    observes = _rules(render("prefect-work-pool", alone, "prefect-work-pool"))
    observes = observes.replace("### worker", "### worker without a reconciler")
    warm = render("prefect-work-pool", tag | {"runs": elsewhere | {"warm": {"replicas": 1}}}, "prefect-work-pool")
    of_worker = _rules(warm).partition("\n### reconciler")[0]
    observes += "\n" + of_worker.replace("### worker", "### worker with warm pods")
    text = NOTE.format("the rendered charts") + "\n"
    if _rules(default) == _rules(with_values):
        text += "The Roles are the same with the default values and with those of `helm/environments/production`.\n"
        return text + "\n" + _rules(default) + "\n" + observes + "\n" + _tokens(with_values)
    text += f"\n## With the default values\n\n{_rules(default)}\n{observes}\n## In production\n\n{_rules(with_values)}"
    return text + "\n" + _tokens(with_values)


def _rules(objects: list[Object]) -> str:
    """Return a table of the permissions of each component. Runs are in the namespace `runs`."""
    roles = {(role["kind"], role["metadata"]["name"]): role for role in objects if role["kind"].endswith("Role")}
    sections: dict[str, list[list[str]]] = {}
    for binding in (item for item in objects if item["kind"].endswith("RoleBinding")):
        role = roles[binding["roleRef"]["kind"], binding["roleRef"]["name"]]
        scope = {None: "the whole cluster", "runs": "namespace of the runs"}.get(
            binding["metadata"].get("namespace"), "namespace of the release"
        )
        for subject in binding["subjects"]:
            component = subject["name"].removeprefix("prefect-work-pool-")
            for rule in role["rules"]:
                group = rule["apiGroups"][0]
                names = ", ".join(map(code, rule.get("resourceNames", [])))
                for resource in rule["resources"]:
                    for verb in rule["verbs"]:
                        shown = code(f"{resource}.{group}" if group else resource)
                        row = [shown, names or "all", scope, code(verb), _reason(component, resource, verb)]
                        sections.setdefault(component, []).append(row)
    head = ("Resource", "Names", "Scope", "Verb", "Why")
    return "\n".join(f"### {name}\n\n{table(head, rows)}" for name, rows in sorted(sections.items(), reverse=True))


def _reason(component: str, resource: str, verb: str) -> str:
    """Return the reason for a permission of a component.

    Raises:
        LookupError: REASONS has no reason for it.
    """
    if text := REASONS.get(component, {}).get(f"{resource} {verb}"):
        return text
    raise LookupError(
        f"{component} may {verb} {resource}, and nothing says why. Add it to REASONS in docs/generate.py."
    )


def _tokens(objects: list[Object]) -> str:
    from tests.helm.rendering import pod_specs

    accounts = {item["metadata"]["name"]: item for item in objects if item["kind"] == "ServiceAccount"}
    rows = []
    for name, spec in sorted(pod_specs(objects).items()):
        account = spec.get("serviceAccountName", "default")
        mounted = spec.get(
            "automountServiceAccountToken", accounts.get(account, {}).get("automountServiceAccountToken")
        )
        rows.append([code(name), code(account), "yes" if mounted is not False else "no"])
    return "## API tokens\n\n" + table(("Pods of", "ServiceAccount", "Token mounted"), rows)


# doctor


def checks() -> str:
    """Return a table of the checks of `orchestrate doctor` for each group."""
    from orchestration.operations.doctor import examination, findings

    assert examination  # its import registers the checks
    lines = [NOTE.format("orchestration/operations/doctor"), ""]
    for group in dict.fromkeys(check.group for check in findings.CHECKS):
        rows = [[check.name, check.purpose] for check in findings.CHECKS if check.group == group]
        lines += [f"## {group.capitalize()}", "", table(("Check", "Ok means"), rows)]
    return "\n".join(lines)


# benchmarks


def load() -> str:
    """Return picture and tables of the recorded benchmark of load."""
    from tests.benchmarks import curves

    return _load(curves.LOAD, "bench-load")


def load_pgbouncer() -> str:
    """Return picture and tables of the recorded benchmark of load through PgBouncer."""
    from tests.benchmarks import curves

    return _load(curves.PGBOUNCER, "bench-load PGBOUNCER=1")


def _load(results: Path, target: str) -> str:
    from tests.benchmarks import curves

    head = ("API replicas", "runs/min at the knee", "requests/s", "clients", "p50 of a request, ms", "p99, ms")
    caption = "Requests per second and their duration by the number of clients; a ring marks the knee"
    text = _measured(results, target, caption, head, curves.load_table)
    if not results.exists() or not (rows := curves.phases_table(json.loads(results.read_text()))):
        return text
    return f"{text}\n{table(('kills, live runs, runs due at once', 'unit', 'n', 'median', 'p99', 'max', ''), rows)}"


def upgrade() -> str:
    """Return picture and table of the recorded benchmark of the upgrade."""
    from tests.benchmarks import curves

    head = ("step", "seconds", "longest lock that blocks writes or reads, s")
    caption = "Seconds of each migration, and of its longest lock"
    return _measured(curves.UPGRADE, "bench-upgrade", caption, head, curves.upgrade_table)


def retention() -> str:
    """Return picture and tables of the recorded benchmark of pages and retention."""
    from tests.benchmarks import curves

    caption = "p95 of each page, and the size of the tables, by the number of runs in the database"
    head = ("page", "p95 of its content, ms", "p50, ms", "p95 of all its requests, ms", "slowest request: p95, ms")
    pages = _measured(curves.RETENTION, "bench-retention", caption, head, curves.retention_table, "")
    if not pages.endswith("|\n"):
        return pages
    found = json.loads(curves.RETENTION.read_text())
    sizes = " → ".join(f"{size['runs']:,}" for size in found["sizes"])
    deleted = table(("kind of record", "old", "deleted", "a second, without pauses"), curves.deletion_table(found))
    longest = ", ".join(f"{seconds:.2f} s {title}" for title, seconds in found["transaction_seconds"].items())
    writes = ", ".join(f"{ms:,} ms {title}" for title, ms in found["write_p95_ms"].items())
    return (
        f"{pages}\nEach page n = {found['loads']}, with {sizes} runs, up to {found['logs']:,} log lines and "
        f"{found['events']:,} events. The goal is {curves.PAGE_GOAL_MS:,} ms for the content.\n\n{deleted}\nEach kind "
        "was deleted for "
        f"{found['limit_seconds']:g} s and not to its end, each table of Prefect's vacuum of events for half of that. "
        f"Longest transaction, which bounds each lock: {longest}. p95 of writing a state: {writes}.\n"
    )


def _measured(
    results: Path,
    target: str,
    caption: str,
    head: tuple[str, ...],
    rows: Callable[[Object], list[list[str]]],
    repetitions: str = ", n = 1",
) -> str:
    """Return picture and table of a benchmark; without results or picture, how to make them."""
    from tests.benchmarks.curves import PICTURES

    picture = REFERENCE.parent / "images" / PICTURES[results]
    if not (results.exists() and picture.exists()):
        return f"No figures yet: `make {target}` records them on an idle machine.\n"
    found = json.loads(results.read_text())
    folder = "images" if target == "bench-upgrade" else "../images"
    origin = (
        f"Measured by `make {target}` on {found['date']}, commit {found['commit']}{repetitions}: {found['machine']}."
    )
    return f"{origin}\n\n![{caption}]({folder}/{picture.name})\n\n{table(head, rows(found))}"


BLOCKS: dict[str, tuple[str, Callable[[], str]]] = {
    "server-values": ("server-values.md", lambda: values("prefect-server")),
    "work-pool-values": ("work-pool-values.md", lambda: values("prefect-work-pool")),
    "orchestrate": ("commands.md", commands),
    "make": ("commands.md", targets),
    "settings": ("settings.md", settings_table),
    "metrics": ("metrics.md", metrics),
    "rbac": ("rbac.md", rbac),
    "checks": ("checks.md", checks),
    "load": ("../how-to/scale-out.md", load),
    "load-pgbouncer": ("../how-to/share-database-connections.md", load_pgbouncer),
    "upgrade": ("../upgrading.md", upgrade),
    "retention": ("../how-to/retention.md", retention),
}
"""Page and function of each generated block. The page is relative to docs/reference."""

NEEDS_HELM = ("rbac",)


def without_blocks(text: str) -> str:
    """Return a page's text without its generated blocks."""
    return re.sub(r"<!-- begin (\S+) -->.*?<!-- end \1 -->", "", text, flags=re.S)


def current(name: str) -> str:
    """Return the current text of a block on its page.

    Raises:
        LookupError: the page has no such block.
    """
    page = REFERENCE / BLOCKS[name][0]
    found = re.search(rf"<!-- begin {name} -->\n\n(.*?)\n<!-- end {name} -->", page.read_text(), flags=re.S)
    if not found:
        raise LookupError(f"{page} has no block `{name}`: add `<!-- begin {name} -->` and `<!-- end {name} -->`.")
    return found[1]


def write(name: str) -> None:
    """Write a block to its page.

    Raises:
        LookupError: the page has no such block, or a text for the block is missing.
        MissingProgramError, ClusterError: helm is not installed, or refuses the values.
    """
    page, make = BLOCKS[name]
    text = (REFERENCE / page).read_text()
    block = f"<!-- begin {name} -->\n\n{make()}\n<!-- end {name} -->"
    written, number = re.subn(rf"<!-- begin {name} -->.*?<!-- end {name} -->", lambda _: block, text, flags=re.S)
    if not number:
        raise LookupError(f"it has no block. Add `<!-- begin {name} -->` and `<!-- end {name} -->`.")
    (REFERENCE / page).write_text(written)


def _shown(page: str) -> str:
    return os.path.normpath(f"docs/reference/{page}")


def main() -> int:
    """Write all blocks, or without helm those that do not need it. Return the exit status."""
    from orchestration.errors import ClusterError
    from orchestration.operations.local_cluster.binaries import MissingProgramError

    for name, (page, _) in BLOCKS.items():
        try:
            write(name)
        except MissingProgramError as error:
            print(f"{_shown(page)} stays as it is: {error}.", file=sys.stderr)
        except (LookupError, ClusterError) as error:
            print(f"{_shown(page)} cannot be written: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
