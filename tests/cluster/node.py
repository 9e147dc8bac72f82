"""A single-node Kubernetes from packages, for a machine without Docker. Linux, root, Debian, Go.

Everything it keeps is under `STATE`, everything it starts has a pid file there, and `down` takes all
of it away. One machine has one such node, whichever checkout asks for it.
"""

import base64
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import yaml

from tests.cluster import binaries, certificates, images
from tests.cluster.progress import ClusterError, step

STATE = Path("/var/lib/prefect-orchestration-node")
CONTEXT = "prefect-node"
NODE, NODE_IP, BRIDGE = "node-1", "10.250.0.1", "kube0"
POD_RANGE, SERVICE_RANGE, DNS_IP, API_IP = "10.244.0.0/24", "10.96.0.0/16", "10.96.0.10", "10.96.0.1"
ETCD = "http://127.0.0.1:23790"
MANIFESTS = Path(__file__).with_name("manifests")

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
        _start_storage()
    with step("Making the images of the sandbox, DNS and metrics", "8 s"):
        images.make_system_images()
    images.make_base_image()
    images.make_databases()
    _stop("agent")  # its code may be another checkout's
    with step("Starting the control plane and the node's agents", "10 s"):
        _start_control_plane(kube)
        _start_node(kube)
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
    from tests.cluster import agent  # its Kubernetes client takes a second to load, which `make` has no need of

    if not STATE.exists():
        print("There is no node.", file=sys.stderr)
        return
    with step("Stopping the node", "10 s"):
        for name in ("agent", "kubelet", "kube-proxy", "kube-scheduler", "kube-controller-manager"):
            _stop(name)
        agent.release()
        _end_containers()
        for name in ("containerd", "kube-apiserver", "etcd", "registry"):
            _stop(name)
        _take_away_network()
        _unmount()
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
    authority.issue("apiserver", "kube-apiserver", hosts=[*names, "localhost", API_IP, NODE_IP, "127.0.0.1"])
    authority.issue("kubelet", f"system:node:{NODE}", "system:nodes", hosts=[NODE, NODE_IP])
    authority.issue("controllers", "system:kube-controller-manager")
    authority.issue("scheduler", "system:kube-scheduler")
    authority.issue("proxy", "system:kube-proxy")
    authority.issue("admin", "admin", "system:masters")
    certificates.signing_key(STATE / "pki" / "service-accounts.key")
    for name in ("kubelet", "controllers", "scheduler", "proxy", "admin"):
        _kubeconfig(name)


def _kubeconfig(name: str) -> None:
    def encoded(file: str) -> str:
        return base64.b64encode((STATE / "pki" / file).read_bytes()).decode()

    cluster = {"server": f"https://{NODE_IP}:6443", "certificate-authority-data": encoded("ca.crt")}
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
        os.environ | environment,
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


# --- registry and containerd ---------------------------------------------------------------------


def _start_storage() -> None:
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
    (STATE / "containerd" / "config.toml").write_text(
        f"""version = 2
root = "{STATE}/containerd/root"
state = "{STATE}/containerd/state"
[grpc]
  address = "{STATE}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  # Where the machine takes CAP_SYS_RESOURCE away, runc may not lower a score.
  restrict_oom_score_adj = true
  sandbox_image = "{images.PAUSE}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{STATE}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""
    )
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(STATE / "cni-addresses"),
            "ranges": [[{"subnet": POD_RANGE}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    (STATE / "cni" / "10-bridge.conflist").write_text(
        json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, ports]})
    )
    _start("containerd", "containerd", "-c", str(STATE / "containerd" / "config.toml"))
    _wait(_registry_answers, "the registry does not answer", "registry", 30)
    _wait(lambda: (STATE / "containerd.sock").exists(), "containerd does not answer", "containerd", 30)


def _registry_answers() -> bool:
    try:
        with urlopen(f"http://{images.REGISTRY}/v2/", timeout=2) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False


def _end_containers() -> None:
    ctr = ["ctr", "-a", str(STATE / "containerd.sock"), "-n", "k8s.io", "tasks"]
    if _pid("containerd") is None:
        return

    def tasks() -> list[str]:
        return subprocess.run([*ctr, "ls", "-q"], capture_output=True, text=True, check=False).stdout.split()

    for task in tasks():
        subprocess.run([*ctr, "kill", "-s", "9", task], capture_output=True, check=False)
    deadline = time.monotonic() + 20
    while (left := tasks()) and time.monotonic() < deadline:
        for task in left:
            subprocess.run([*ctr, "delete", "-f", task], capture_output=True, check=False)


def _unmount() -> None:
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((mount for mount in mounts if mount.startswith(f"{STATE}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False)


# --- network -------------------------------------------------------------------------------------


def _network() -> None:
    """A bridge that carries the node's address, and routes that keep strangers out."""
    # Not a dummy link: not every kernel has them. Kubelet refuses a node address on loopback.
    if not Path(f"/sys/class/net/{BRIDGE}").exists():
        binaries.run(["ip", "link", "add", BRIDGE, "type", "bridge"])
        binaries.run(["ip", "addr", "add", f"{NODE_IP}/32", "dev", BRIDGE])
        binaries.run(["ip", "link", "set", BRIDGE, "up"])
    # A service that kube-proxy does not know must not leave this machine by the default route.
    binaries.run(["ip", "route", "replace", SERVICE_RANGE, "dev", BRIDGE])
    binaries.run(["ip", "route", "replace", "unreachable", "10.244.0.0/16"])
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
    subprocess.run(["ip", "route", "del", "unreachable", "10.244.0.0/16"], capture_output=True, check=False)
    for link in ("cni0", BRIDGE):
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
        f"--advertise-address={NODE_IP}", f"--bind-address={NODE_IP}", "--secure-port=6443",
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


def _start_node(kube: str) -> None:
    kubelet = {
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
        "containerRuntimeEndpoint": f"unix://{STATE}/containerd.sock",
        "tlsCertFile": f"{STATE}/pki/kubelet.crt",
        "tlsPrivateKeyFile": f"{STATE}/pki/kubelet.key",
        "podLogsDir": f"{STATE}/pod-logs",
        "volumePluginDir": f"{STATE}/volume-plugins",
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "200Mi"},
        "nodeStatusUpdateFrequency": "4s",
        "serializeImagePulls": False,
        "resolvConf": "/etc/resolv.conf",
    }
    proxy = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": f"{STATE}/pki/proxy.kubeconfig"},
        "clusterCIDR": POD_RANGE,
        "hostnameOverride": NODE,
        "mode": "iptables",
        "conntrack": {"maxPerCore": 0},
    }
    for name, content in (("config", kubelet), ("proxy", proxy)):
        path, text = STATE / "kubelet" / f"{name}.yaml", yaml.safe_dump(content)
        # kube-proxy exits when its file is written again.
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    _start(
        "kubelet", kube, "kubelet", f"--config={STATE}/kubelet/config.yaml",
        f"--kubeconfig={STATE}/pki/kubelet.kubeconfig", f"--root-dir={STATE}/kubelet/root",
        f"--hostname-override={NODE}", f"--node-ip={NODE_IP}",
    )  # fmt: skip
    _start("kube-proxy", kube, "kube-proxy", f"--config={STATE}/kubelet/proxy.yaml")
    root = str(Path(__file__).resolve().parents[2])
    _start(
        "agent", sys.executable, "-m", "tests.cluster.agent", str(KUBECONFIG), str(STATE / "volumes"),
        environment={"PYTHONPATH": root},
    )  # fmt: skip


def _api_ready() -> bool:
    with contextlib.suppress(ClusterError):
        return kubectl("get", "--raw", "/readyz", "--request-timeout=2s") == "ok"
    return False


def _node_ready() -> bool:
    ready = "jsonpath={.status.conditions[?(@.type=='Ready')].status}"
    with contextlib.suppress(ClusterError):
        return kubectl("get", "node", NODE, "-o", ready, "--request-timeout=2s") == "True"
    return False


@contextlib.contextmanager
def without_policies() -> Iterator[None]:
    """The node as if nothing enforced its NetworkPolicies."""
    from tests.cluster import agent

    _stop("agent")
    agent.release()
    try:
        yield
    finally:
        _start_node(str(binaries.kube()))
