"""A single-node Kubernetes from packages, for a machine without Docker. Linux, root, Debian, Go.

Everything it keeps is under `STATE`, everything it starts has a pid file there, and `down` takes all
of it away. One machine has one such node, whichever checkout asks for it; for what becomes of pods whose node goes it
has `second`, a second one of the same cluster.
"""

import base64
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import yaml

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries, certificates, images
from orchestration.progress import step
from orchestration.settings import ROOT

STATE = Path("/var/lib/prefect-orchestration-node")
CONTEXT = "prefect-node"
BRIDGE = "kube0"
POD_RANGE, SERVICE_RANGE, DNS_IP, API_IP = "10.244.0.0/16", "10.96.0.0/16", "10.96.0.10", "10.96.0.1"
ETCD = "http://127.0.0.1:23790"
MANIFESTS = Path(__file__).with_name("manifests")
CGROUPS = Path("/sys/fs/cgroup")

TESTS_PROCESS = "TESTS_PROCESS"
"""Variable with the id of the process of tests that has started a program (tests/reporting.py); the node's own
programs, which outlive it, do not have it."""


@dataclass(frozen=True)
class Node:
    """A kubelet with a containerd of its own.

    Args:
        name: to Kubernetes.
        ip: its address.
        pods: the addresses of its pods.
        bridge: the link that they are on.
        suffix: of its processes' names.
        port: of its kubelet.
        cgroup: below which its pods are; a kubelet ends what it does not know there.
        taint: what keeps pods away that do not tolerate it.
    """

    name: str
    ip: str
    pods: str
    bridge: str
    suffix: str = ""
    port: int = 10250
    cgroup: str = "/"
    taint: str = ""

    @property
    def folder(self) -> Path:
        """What its containerd and kubelet keep."""
        return STATE / self.name if self.suffix else STATE

    @property
    def socket(self) -> Path:
        """Of its containerd."""
        return self.folder / "containerd.sock"


FIRST = Node("node-1", "10.250.0.1", "10.244.0.0/24", "cni0")
SECOND = Node("node-2", "10.250.0.2", "10.244.1.0/24", "cni1", "-2", 10260, "/node-2", "tests/second-node")
NODES = (FIRST, SECOND)

KUBECONFIG = STATE / "pki" / "admin.kubeconfig"


def unavailable() -> str | None:
    """Why this machine cannot be a node; None if it can."""
    if sys.platform != "linux":
        return "it is not Linux"
    if os.geteuid() != 0:
        return "you are not root"
    if not shutil.which("go"):
        return "there is no Go to build Kubernetes with"
    return None


def up() -> None:
    """Make and start the node; what is there and runs is left as it is."""
    binaries.install_packages()
    kube = str(binaries.kube())
    for name in ("helm", "coredns", "metrics-server"):
        binaries.program(name)
    if KUBECONFIG.exists() and not (STATE / "pki" / "kubelet-2.kubeconfig").exists():
        down()  # an older checkout's; the authority's key is not kept
    for name in ("pki", "log", "run", "cni", "containerd", "kubelet"):
        (STATE / name).mkdir(parents=True, exist_ok=True)
    complete, version = STATE / "complete", _version()
    if running() and not _components_down() and complete.exists() and complete.read_text() == version:
        _publish_context()
        print(f"The node runs: kubectl --context {CONTEXT}", file=sys.stderr)
        return
    complete.unlink(missing_ok=True)
    if not KUBECONFIG.exists():
        _make_certificates()
    with step("Starting the registry and containerd", "2 s"):
        _network()
        _start_registry()
        _start_containerd(FIRST)
    with step("Making the images of the sandbox, DNS and metrics", "8 s"):
        images.make_system_images()
    images.make_base_image()
    images.make_databases()
    _stop("agent")  # its code may be another checkout's
    with step("Starting the control plane and the node's agents", "10 s"):
        _start_control_plane(kube)
        _start_kubelet(kube, FIRST)
        _start_agents(kube)
        _wait(_node_ready, "the node is not Ready", "kubelet")
    with step("Starting DNS, storage and metrics", "15 s"):
        for manifest in sorted(MANIFESTS.iterdir()):
            kubectl("apply", "--server-side", "-f", str(manifest))
        try:
            kubectl("-n", "kube-system", "rollout", "status", "deployment", "--timeout=120s")
        except ClusterError as error:
            pods = kubectl("-n", "kube-system", "get", "pods", "--no-headers").strip().replace("\n", "; ")
            raise ClusterError(f"The node's own pods do not start: {pods}") from error
    _publish_context()
    complete.write_text(version)
    print(f"The node is up: kubectl --context {CONTEXT}", file=sys.stderr)


def down() -> None:
    """Stop the node and take away all that it made: mounts, links, rules and state."""
    from orchestration.operations.local_cluster import (
        agent,  # its Kubernetes client takes a second to load, which `make` has no need of
    )

    if not STATE.exists():
        print("There is no node.", file=sys.stderr)
        return
    with step("Stopping the node", "10 s"):
        for name in ("agent", "kubelet", "kubelet-2", "kube-proxy", "kube-scheduler", "kube-controller-manager"):
            _stop(name)
        agent.release()
        for each in NODES:
            _end_containers(each)
        for name in ("containerd", "containerd-2", "kube-apiserver", "etcd", "registry"):
            _stop(name)
        _take_away_network()
        _unmount(STATE)
        shutil.rmtree(STATE)
    _retract_context()


def _version() -> str:
    """What the node is made from: another checkout's code or manifests make it up to date."""
    folder = Path(__file__).parent
    files = [*(file for file in folder.glob("*.py") if not file.name.startswith("test_")), *MANIFESTS.iterdir()]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


# --- the way in ---------------------------------------------------------------------------------


def running() -> bool:
    """Whether the node's API answers and the node is Ready."""
    return KUBECONFIG.exists() and _node_ready()


def kubectl(*arguments: str, text: str | None = None) -> str:
    """Run kubectl on the node; what it printed."""
    return binaries.kubectl("--kubeconfig", str(KUBECONFIG), *arguments, text=text)


def _publish_context() -> None:
    """Add the node's context to the person's kubeconfig; the current context stays what it is."""
    target = Path(os.environ.get("KUBECONFIG", "").split(os.pathsep)[0] or Path.home() / ".kube" / "config")
    known: dict[str, Any] = (yaml.safe_load(target.read_text()) if target.exists() else None) or {}
    own = yaml.safe_load(KUBECONFIG.read_text())
    known = {"apiVersion": "v1", "kind": "Config", "preferences": {}, "current-context": CONTEXT} | known
    for part in ("clusters", "users", "contexts"):
        others = [entry for entry in known.get(part) or [] if entry["name"] != CONTEXT]
        known[part] = others + own[part]
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = target.with_name(f".{target.name}.new")
    fresh.touch(mode=0o600)
    fresh.write_text(yaml.safe_dump(known))
    fresh.replace(target)


def _retract_context() -> None:
    """Take the node's context out of the person's kubeconfig."""
    for part in ("context", "cluster", "user"):
        with contextlib.suppress(ClusterError):  # it is not there
            binaries.kubectl("config", f"delete-{part}", CONTEXT)


# --- certificates and kubeconfigs ----------------------------------------------------------------


def _make_certificates() -> None:
    authority = certificates.Authority(STATE / "pki")
    names = [f"kubernetes{suffix}" for suffix in ("", ".default", ".default.svc", ".default.svc.cluster.local")]
    authority.issue("apiserver", "kube-apiserver", hosts=[*names, "localhost", API_IP, FIRST.ip, "127.0.0.1"])
    for each in NODES:
        name = f"kubelet{each.suffix}"
        authority.issue(name, f"system:node:{each.name}", "system:nodes", hosts=[each.name, each.ip])
    authority.issue("controllers", "system:kube-controller-manager")
    authority.issue("scheduler", "system:kube-scheduler")
    authority.issue("proxy", "system:kube-proxy")
    authority.issue("admin", "admin", "system:masters")
    certificates.signing_key(STATE / "pki" / "service-accounts.key")
    for name in ("kubelet", "kubelet-2", "controllers", "scheduler", "proxy", "admin"):
        _kubeconfig(name)


def _kubeconfig(name: str) -> None:
    def encoded(file: str) -> str:
        return base64.b64encode((STATE / "pki" / file).read_bytes()).decode()

    cluster = {"server": f"https://{FIRST.ip}:6443", "certificate-authority-data": encoded("ca.crt")}
    user = {"client-certificate-data": encoded(f"{name}.crt"), "client-key-data": encoded(f"{name}.key")}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": CONTEXT, "cluster": cluster}],
        "users": [{"name": CONTEXT, "user": user}],
        "contexts": [{"name": CONTEXT, "context": {"cluster": CONTEXT, "user": CONTEXT}}],
        "current-context": CONTEXT,
    }
    path = STATE / "pki" / f"{name}.kubeconfig"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(content))


# --- processes ----------------------------------------------------------------------------------

COMPONENTS = (
    "registry",
    "containerd",
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "agent",
)


def _pid(name: str) -> int | None:
    """The component's process, if it runs."""
    try:
        pid, started = (STATE / "run" / f"{name}.pid").read_text().split()
        # The same number after a reboot is somebody else's.
        return int(pid) if _started(int(pid)) == started else None
    except (OSError, ValueError):
        return None


def _started(pid: int) -> str:
    """When a process started, in ticks since boot; raises OSError if there is none."""
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if state == "Z":
        with contextlib.suppress(ChildProcessError):  # its parent is not this process
            os.waitpid(pid, os.WNOHANG)
        return ""
    return fields[18]


def _components_down() -> list[str]:
    return [name for name in COMPONENTS if _pid(name) is None]


def _start(name: str, *command: str, environment: Mapping[str, str] = {}) -> None:
    """Start a component unless it runs."""
    if _pid(name) is not None:
        return
    log = os.open(STATE / "log" / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    # Not subprocess: its Popen wants to see the end of a process that is to outlive this one.
    pid = os.posix_spawnp(
        command[0],
        command,
        {name: value for name, value in (os.environ | environment).items() if name != TESTS_PROCESS},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, log, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
        ],
        setsid=True,
    )
    os.close(log)
    (STATE / "run" / f"{name}.pid").write_text(f"{pid} {_started(pid)}")


def _stop(name: str, grace: float = 5) -> None:
    pid = _pid(name)
    if pid is None:
        return
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
        deadline = time.monotonic() + grace
        while _pid(name) is not None and time.monotonic() < deadline:
            time.sleep(0.05)


def _wait(condition: Callable[[], bool], otherwise: str, name: str, seconds: float = 120) -> None:
    """Wait for a component; its log says what is wrong."""
    deadline = time.monotonic() + seconds
    while not condition():
        log = STATE / "log" / f"{name}.log"
        if _pid(name) is None:
            last = " ".join(log.read_text().strip().splitlines()[-1:])
            raise ClusterError(f"{name} ended: {last}. Its log is {log}")
        if time.monotonic() > deadline:
            raise ClusterError(f"After {seconds:.0f} s {otherwise}. Look at {log}")
        time.sleep(0.1)


def processor_seconds() -> dict[str, float]:
    """Return the processor seconds of each namespace's pods since the node's agent was started; by namespace."""
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, float] = json.loads((STATE / "processor.json").read_text())
        return found
    return {}


def processes() -> set[int]:
    """Return the ids of the node's own processes: children of who started them, for whose work they do not count."""
    return {pid for name in (*COMPONENTS, "kubelet-2", "containerd-2") if (pid := _pid(name)) is not None}


# --- registry and containerd ---------------------------------------------------------------------


def _start_registry() -> None:
    registry = STATE / "registry.yaml"
    registry.write_text(
        yaml.safe_dump(
            {
                "version": "0.1",
                "log": {"level": "warn"},
                "storage": {"filesystem": {"rootdirectory": str(STATE / "registry")}, "delete": {"enabled": True}},
                "http": {"addr": "127.0.0.1:5000"},
            }
        )
    )
    _start("registry", "docker-registry", "serve", str(registry))
    _wait(_registry_answers, "the registry does not answer", "registry", 30)


def _start_containerd(node: Node) -> None:
    for name in ("cni", "containerd", "kubelet"):
        (node.folder / name).mkdir(parents=True, exist_ok=True)
    (node.folder / "containerd" / "config.toml").write_text(
        f"""version = 2
root = "{node.folder}/containerd/root"
state = "{node.folder}/containerd/state"
[grpc]
  address = "{node.socket}"
[plugins."io.containerd.grpc.v1.cri"]
  # Where the machine takes CAP_SYS_RESOURCE away, runc may not lower a score.
  restrict_oom_score_adj = true
  sandbox_image = "{images.PAUSE}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{node.folder}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""
    )
    bridge = {
        "type": "bridge",
        "bridge": node.bridge,
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(node.folder / "cni-addresses"),
            "ranges": [[{"subnet": node.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    (node.folder / "cni" / "10-bridge.conflist").write_text(
        json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, ports]})
    )
    name = f"containerd{node.suffix}"
    _start(name, "containerd", "-c", str(node.folder / "containerd" / "config.toml"))
    _wait(node.socket.exists, "containerd does not answer", name, 30)


def _registry_answers() -> bool:
    try:
        with urlopen(f"http://{images.REGISTRY}/v2/", timeout=2) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False


def _end_containers(node: Node) -> None:
    ctr = ["ctr", "-a", str(node.socket), "-n", "k8s.io", "tasks"]
    if _pid(f"containerd{node.suffix}") is None:
        return

    def tasks() -> list[str]:
        return subprocess.run([*ctr, "ls", "-q"], capture_output=True, text=True, check=False).stdout.split()

    for task in tasks():
        subprocess.run([*ctr, "kill", "-s", "9", task], capture_output=True, check=False)
    deadline = time.monotonic() + 20
    while (left := tasks()) and time.monotonic() < deadline:
        for task in left:
            subprocess.run([*ctr, "delete", "-f", task], capture_output=True, check=False)


def _unmount(folder: Path) -> None:
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((mount for mount in mounts if mount.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False)


# --- network -------------------------------------------------------------------------------------


def _network() -> None:
    """A bridge that carries the node's address, and routes that keep strangers out."""
    # Not a dummy link: not every kernel has them. Kubelet refuses a node address on loopback.
    if not Path(f"/sys/class/net/{BRIDGE}").exists():
        binaries.run(["ip", "link", "add", BRIDGE, "type", "bridge"])
        for node in NODES:
            binaries.run(["ip", "addr", "add", f"{node.ip}/32", "dev", BRIDGE])
        binaries.run(["ip", "link", "set", BRIDGE, "up"])
    # A service that kube-proxy does not know must not leave this machine by the default route.
    binaries.run(["ip", "route", "replace", SERVICE_RANGE, "dev", BRIDGE])
    binaries.run(["ip", "route", "replace", "unreachable", POD_RANGE])
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    bridged = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not bridged.exists():
        subprocess.run(["modprobe", "br_netfilter"], capture_output=True, check=False)
    if not bridged.exists():
        raise ClusterError(
            "The kernel has no br_netfilter, so that no policy between pods can be enforced. Load that module"
        )
    bridged.write_text("1")


def _take_away_network() -> None:
    for netns in Path("/run/netns").glob("cni-*"):
        subprocess.run(["ip", "netns", "delete", netns.name], capture_output=True, check=False)
    subprocess.run(["ip", "route", "del", "unreachable", POD_RANGE], capture_output=True, check=False)
    for link in (*(node.bridge for node in NODES), BRIDGE):
        subprocess.run(["ip", "link", "delete", link], capture_output=True, check=False)
    # kube-proxy's and the plugins' rules: without the node they are dead weight for every packet.
    for table in ("nat", "filter", "mangle"):
        saved = binaries.run(["iptables-save", "-t", table]).splitlines()
        own = ("KUBE-", "CNI-", "NETPOL-")
        kept = [line for line in saved if not any(f" {prefix}" in line or f":{prefix}" in line for prefix in own)]
        if kept != saved:
            subprocess.run(["iptables-restore", "-T", table], input="\n".join(kept) + "\n", text=True, check=True)


# --- Kubernetes ----------------------------------------------------------------------------------


def _start_control_plane(kube: str) -> None:
    pki = STATE / "pki"
    _start(
        "etcd", "etcd", "--data-dir", str(STATE / "etcd"), "--listen-client-urls", ETCD,
        "--advertise-client-urls", ETCD, "--listen-peer-urls", "http://127.0.0.1:23800",
        "--unsafe-no-fsync",  # a node that loses power is made anew
    )  # fmt: skip
    _start(
        "kube-apiserver", kube, "kube-apiserver", f"--etcd-servers={ETCD}",
        f"--advertise-address={FIRST.ip}", f"--bind-address={FIRST.ip}", "--secure-port=6443",
        f"--tls-cert-file={pki}/apiserver.crt", f"--tls-private-key-file={pki}/apiserver.key",
        f"--client-ca-file={pki}/ca.crt", f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={pki}/service-accounts.key",
        f"--service-account-signing-key-file={pki}/service-accounts.key",
        "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
        f"--kubelet-client-certificate={pki}/admin.crt", f"--kubelet-client-key={pki}/admin.key",
        "--kubelet-preferred-address-types=InternalIP", "--allow-privileged=true",
        f"--requestheader-client-ca-file={pki}/ca.crt", "--requestheader-allowed-names=admin",
        "--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={pki}/admin.crt", f"--proxy-client-key-file={pki}/admin.key",
        "--enable-aggregator-routing=true",
    )  # fmt: skip
    _wait(_api_ready, "the API is not ready", "kube-apiserver")
    _start(
        "kube-controller-manager", kube, "kube-controller-manager", f"--kubeconfig={pki}/controllers.kubeconfig",
        "--use-service-account-credentials=true", "--leader-elect=false", "--allocate-node-cidrs=false",
        f"--service-account-private-key-file={pki}/service-accounts.key", f"--root-ca-file={pki}/ca.crt",
    )  # fmt: skip
    _start("kube-scheduler", kube, "kube-scheduler", f"--kubeconfig={pki}/scheduler.kubeconfig", "--leader-elect=false")


def _start_kubelet(kube: str, node: Node) -> None:
    kubelet: dict[str, Any] = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{STATE}/pki/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        # Images that the node's registry gave need no credentials again.
        "imagePullCredentialsVerificationPolicy": "NeverVerify",
        "clusterDNS": [DNS_IP],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": f"unix://{node.socket}",
        "tlsCertFile": f"{STATE}/pki/kubelet{node.suffix}.crt",
        "tlsPrivateKeyFile": f"{STATE}/pki/kubelet{node.suffix}.key",
        "podLogsDir": f"{node.folder}/pod-logs",
        "volumePluginDir": f"{node.folder}/volume-plugins",
        "port": node.port,
        "healthzPort": 0,
        "cgroupRoot": node.cgroup,
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "200Mi"},
        "nodeStatusUpdateFrequency": "4s",
        "serializeImagePulls": False,
        "resolvConf": "/etc/resolv.conf",
    }
    if node.taint:
        kubelet["registerWithTaints"] = [{"key": node.taint, "effect": "NoSchedule"}]
        _make_cgroup(node)
    _write(node.folder / "kubelet" / "config.yaml", kubelet)
    _start(
        f"kubelet{node.suffix}", kube, "kubelet", f"--config={node.folder}/kubelet/config.yaml",
        f"--kubeconfig={STATE}/pki/kubelet{node.suffix}.kubeconfig", f"--root-dir={node.folder}/kubelet/root",
        f"--hostname-override={node.name}", f"--node-ip={node.ip}",
    )  # fmt: skip


def _write(path: Path, content: Any) -> None:
    # kube-proxy exits when its file is written again.
    text = yaml.safe_dump(content)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _cgroups(node: Node) -> list[Path]:
    """The node's folder in each hierarchy; there is one in version 2, and one for each controller in version 1."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS / node.cgroup[1:]]
    return [each / node.cgroup[1:] for each in sorted(CGROUPS.iterdir()) if each.is_dir() and not each.is_symlink()]


def _make_cgroup(node: Node) -> None:
    for folder in _cgroups(node):
        folder.mkdir(exist_ok=True)
        # Version 1 lets no process in before these are set.
        for name in ("cpuset.cpus", "cpuset.mems"):
            if (folder / name).exists():
                (folder / name).write_text((folder.parent / name).read_text())


def _start_agents(kube: str) -> None:
    proxy = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": f"{STATE}/pki/proxy.kubeconfig"},
        "clusterCIDR": POD_RANGE,
        "hostnameOverride": FIRST.name,
        "mode": "iptables",
        "conntrack": {"maxPerCore": 0},
    }
    _write(STATE / "kubelet" / "proxy.yaml", proxy)
    _start("kube-proxy", kube, "kube-proxy", f"--config={STATE}/kubelet/proxy.yaml")
    _start(
        "agent", sys.executable, "-m", "orchestration.operations.local_cluster.agent",
        str(KUBECONFIG), str(STATE / "volumes"), str(STATE / "processor.json"),
        environment={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def _api_ready() -> bool:
    with contextlib.suppress(ClusterError):
        return kubectl("get", "--raw", "/readyz", "--request-timeout=2s") == "ok"
    return False


def _node_ready(node: Node = FIRST) -> bool:
    # What the API says of the node may be of before its kubelet was stopped.
    if not accepts(node.ip, node.port):
        return False
    ready = "jsonpath={.status.conditions[?(@.type=='Ready')].status}"
    with contextlib.suppress(ClusterError):
        return kubectl("get", "node", node.name, "-o", ready, "--request-timeout=10s") == "True"
    return False


@contextlib.contextmanager
def without_policies() -> Iterator[None]:
    """The node as if nothing enforced its NetworkPolicies."""
    from orchestration.operations.local_cluster import agent

    _stop("agent")
    agent.release()
    try:
        yield
    finally:
        _start_agents(str(binaries.kube()))


# --- the second node -----------------------------------------------------------------------------


@contextlib.contextmanager
def second() -> Iterator[Node]:
    """A second node while the block lasts, for pods that tolerate its taint."""
    _take_away(SECOND)
    try:
        _start_containerd(SECOND)
        start_kubelet(SECOND)
        yield SECOND
    finally:
        _take_away(SECOND)


def stop_kubelet(node: Node) -> None:
    """As when a node is cut off: its pods run on, and nobody hears of them."""
    _stop(f"kubelet{node.suffix}")


def start_kubelet(node: Node) -> None:
    """Start it, and wait until the node is Ready."""
    _start_kubelet(str(binaries.kube()), node)
    _wait(lambda: _node_ready(node), f"{node.name} is not Ready", f"kubelet{node.suffix}")


def accepts(address: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), 2):
        return True
    return False


def _take_away(node: Node) -> None:
    stop_kubelet(node)
    with contextlib.suppress(ClusterError):
        kubectl("delete", "node", node.name, "--ignore-not-found")
    _end_containers(node)
    _stop(f"containerd{node.suffix}")
    _unmount(node.folder)
    shutil.rmtree(node.folder, ignore_errors=True)
    for folder in _cgroups(node):
        for path in sorted([folder, *folder.rglob("*/")], reverse=True):
            with contextlib.suppress(OSError):  # it is not there, or ends by itself
                path.rmdir()
    subprocess.run(["ip", "link", "delete", node.bridge], capture_output=True, check=False)


@contextlib.contextmanager
def without_api() -> Iterator[None]:
    """The node without the Kubernetes API while the block lasts: connections are refused."""
    _stop("kube-apiserver")
    try:
        yield
    finally:
        _start_control_plane(str(binaries.kube()))


@contextlib.contextmanager
def with_silent_api() -> Iterator[None]:
    """The node with a Kubernetes API that takes connections and answers nothing while the block lasts."""
    process = _pid("kube-apiserver")
    if process is None:
        raise ClusterError("kube-apiserver does not run")
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)
