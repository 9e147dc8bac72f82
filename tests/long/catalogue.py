"""The catalogue of the long tests."""

from tests.long import benchmarks, dbt_ends, kills, soak, sync_kills
from tests.long.longtest import LongTest
from tests.long.suite import suite

PREFECT = ("uv.lock#prefect", "uv.lock#fastapi", "uv.lock#sqlalchemy")

DBT = (
    "orchestration/dbt",
    "orchestration/prefect_compat",
    "orchestration/local/embedded_postgres.py",
    "orchestration/warehouse.py",
    *PREFECT,
    "uv.lock#dbt-core",
    "uv.lock#dbt-postgres",
)

DBT_TESTS = ("tests/orchestration/dbt/projects.py", "tests/orchestration/dbt/task_runs.py")

CHARTS = (
    "helm/prefect-server/templates",
    "helm/prefect-server/values.yaml",
    "helm/prefect-work-pool/templates",
    "helm/prefect-work-pool/values.yaml",
    "docker/Dockerfile",
)

RUNS = (
    "orchestration/reconciler",
    "orchestration/prefect_api.py",
    "orchestration/execution.py",
    "orchestration/runs",
    "orchestration/prefect_compat",
    "orchestration/prefect_protocol.py",
    "orchestration/protocol.py",
    "orchestration/diagnosis_table.py",
    "orchestration/access",
    "orchestration/health.py",
    "orchestration/logs.py",
    "orchestration/maintenance.py",
    "orchestration/api_tls.py",
    "orchestration/server_process.py",
    "orchestration/worker/__main__.py",
    "orchestration/worker/job_template.py",
    "orchestration/worker/kubernetes_worker.py",
    *CHARTS,
    "tests/e2e/pace.py",
    "tests/e2e/release.py",
    "tests/e2e/runs.py",
    *PREFECT,
    "uv.lock#prefect-kubernetes",
)
"""The code that executes flow runs on Kubernetes and recovers them."""

PROPERTIES = (
    "tests/docker/test_stack.py",
    "tests/flows/test_landing.py",
    "tests/orchestration/access/test_limits.py",
    "tests/orchestration/dbt/test_options.py",
    "tests/orchestration/deployments/test_differential.py",
    "tests/orchestration/deployments/test_export.py",
    "tests/orchestration/deployments/test_files.py",
    "tests/orchestration/deployments/test_flows.py",
    "tests/orchestration/deployments/test_schedules.py",
    "tests/orchestration/inspection/test_memory.py",
    "tests/orchestration/reconciler/test_containers.py",
    "tests/orchestration/reconciler/test_decide.py",
    "tests/orchestration/reconciler/test_hostile.py",
    "tests/orchestration/reconciler/test_idle.py",
    "tests/orchestration/runs/test_result_signing.py",
    "tests/orchestration/test_bad_input.py",
    "tests/orchestration/test_quantity.py",
    "tests/orchestration/test_terminal.py",
    "tests/orchestration/worker/test_docker_proxy.py",
    "tests/orchestration/worker/test_job_template.py",
)
"""The test files with property tests by Hypothesis."""

TESTED_BY_PROPERTIES = (
    "flows/landing.py",
    "orchestration/access/limits.py",
    "orchestration/dbt/options.py",
    "orchestration/deployments",
    "orchestration/inspection/memory.py",
    "orchestration/local/docker_secrets.py",
    "orchestration/quantity.py",
    "orchestration/reconciler",
    "orchestration/runs/result_signing.py",
    "orchestration/terminal.py",
    "orchestration/worker/docker_policy.py",
    "orchestration/worker/docker_proxy.py",
    "orchestration/worker/job_template.py",
)
"""The code that these files test."""

CHART_VALUES = tuple(
    f"tests/helm/{name}.py"
    for name in ("test_values", "values", "verdicts", "acceptance", "rendering", "cloudnative_pg")
)

UPGRADES = ("tests/e2e/test_prefect_server.py", "tests/e2e/test_prefect_work_pool.py")

CLUSTER = tuple(f"tests/e2e/test_{name}.py" for name in ("environment", "kubectl_worker", "pgbouncer", "security"))
"""The other test files on the cluster whose waits are scaled in `make test`."""

SERVICE_FAULTS = "tests/orchestration/services/test_service_faults.py"

SEED = 2013

LONG_TESTS = (
    LongTest(
        "soak",
        "Random faults lose, block and duplicate none of many runs on the cluster, and leave nothing behind.",
        (*RUNS, "tests/e2e/faults/flow.py", "tests/e2e/faults/victims.py", "tests/long/soak.py"),
        soak.run,
        {"MINUTES": 30, "RUNS": 200, "SEED": SEED},
        cluster=True,
    ),
    LongTest(
        "kills",
        "A daily run that is killed at a random moment leaves no half-loaded day, and the next run completes it.",
        ("flows", "orchestration/settings.py", *DBT, "tests/long/kills.py"),
        kills.run,
        {"KILLS": 50, "SEED": SEED},
    ),
    LongTest(
        "sync-kills",
        "The next sync completes a sync that was killed at a random moment; no scheduled run is missing or duplicated.",
        (
            "orchestration/deployments",
            "orchestration/__main__.py",
            "orchestration/prefect_api.py",
            "orchestration/prefect_compat",
            *PREFECT,
            "tests/long/sync_kills.py",
        ),
        sync_kills.run,
        {"KILLS": 30, "SEED": SEED},
    ),
    LongTest(
        "dbt-ends",
        "A dbt run that is killed or cancelled at a random moment leaves no SQL, and its retry completes it.",
        (
            "orchestration/runs",
            "orchestration/protocol.py",
            *DBT,
            *DBT_TESTS,
            "tests/orchestration/dbt/shop_flow.py",
            "tests/long/dbt_ends.py",
        ),
        dbt_ends.run,
        {"ROUNDS": 20, "SEED": SEED},
    ),
    LongTest(
        "faults",
        "The fault suite passes at the shipped time constants, with outages of minutes.",
        (*RUNS, "tests/e2e/conftest.py", "tests/e2e/faults"),
        suite("tests/e2e/faults"),
        cluster=True,
    ),
    LongTest(
        "upgrades",
        "Both charts are upgraded and rolled back under load at the shipped time constants.",
        (*RUNS, "orchestration/migrations.py", "tests/e2e/conftest.py", *UPGRADES),
        suite(*UPGRADES),
        cluster=True,
    ),
    LongTest(
        "cluster",
        "The environment of make, kubectl's worker, PgBouncer and the isolation of runs pass at the shipped constants.",
        (
            *RUNS,
            "orchestration/deployments",
            "orchestration/operations",
            "helm/environments",
            "k8s/worker",
            "tests/e2e/conftest.py",
            "tests/e2e/checkout.py",
            *CLUSTER,
        ),
        suite(*CLUSTER),
        cluster=True,
    ),
    LongTest(
        "service-faults",
        "Each fault of Postgres, Redis and a background service turns the right probe red at the limit of 60 s.",
        (
            "orchestration/services",
            "orchestration/prefect_compat",
            *PREFECT,
            "uv.lock#prefect-redis",
            "uv.lock#pydocket",
            "tests/e2e/pace.py",
            "tests/service_faults.py",
            SERVICE_FAULTS,
        ),
        suite(SERVICE_FAULTS),
    ),
    LongTest(
        "cluster-upgrade",
        "`make deploy` upgrades the previous release during flow runs, `make rollback` reverts it, and no run is lost.",
        (
            *RUNS,
            "orchestration/deployments",
            "orchestration/migrations.py",
            "orchestration/operations",
            "helm/environments",
            "tests/e2e/checkout.py",
            "tests/versions/catalogue.py",
            "tests/long/cluster_upgrade.py",
        ),
        suite("tests/long/cluster_upgrade.py"),
        cluster=True,
    ),
    LongTest(
        "production",
        "ENV=production is installed with two replicas of each component on external databases and runs the daily job.",
        (
            "orchestration/operations",
            "helm/environments",
            *CHARTS,
            *PREFECT,
            "tests/e2e/checkout.py",
            "tests/long/production.py",
        ),
        suite("tests/long/production.py"),
        cluster=True,
    ),
    LongTest(
        "docker-pool",
        "Without Kubernetes, one machine with Docker runs the daily deployment as a container and survives faults.",
        (
            *(f"docker/{name}" for name in ("Dockerfile", "build", "compose.yaml", "databases", "pool.yaml", "stack")),
            "orchestration/access",
            "orchestration/local/docker_secrets.py",
            "orchestration/api_tls.py",
            "orchestration/server_process.py",
            "orchestration/worker/__main__.py",
            "orchestration/worker/docker_policy.py",
            "orchestration/worker/docker_proxy.py",
            "orchestration/worker/job_template.py",
            "tests/docker/daemon.py",
            "tests/versions/catalogue.py",
            "tests/long/docker_pool.py",
            *PREFECT,
            "uv.lock#prefect-docker",
        ),
        suite("tests/long/docker_pool.py"),
        cluster=True,
    ),
    LongTest(
        "cases",
        "The further cases of claims of which `make test` tries one or two.",
        ("flows", "orchestration", "helm", "docker/Dockerfile", *PREFECT),
        suite("tests", "-m", "further"),
        cluster=True,
    ),
    LongTest(
        "properties",
        "The property tests hold for many more examples than in `make test`.",
        (*TESTED_BY_PROPERTIES, *PROPERTIES),
        suite(*PROPERTIES, HYPOTHESIS_PROFILE="long"),
        {"SEED": SEED},
    ),
    LongTest(
        "chart-values",
        "More than a thousand drawn values are refused by name, or real servers accept what the charts render.",
        ("helm/prefect-server", "helm/prefect-work-pool", *CHART_VALUES),
        suite(CHART_VALUES[0], HYPOTHESIS_PROFILE="long"),
        {"SEED": SEED},
    ),
    LongTest(
        "random-graphs",
        "Every node of many random dbt graphs with random failures has the outcome of dbt's command line.",
        (*DBT, *DBT_TESTS, "tests/orchestration/dbt/test_random.py"),
        suite("tests/orchestration/dbt/test_random.py", HYPOTHESIS_PROFILE="long"),
        {"SEED": SEED},
    ),
    LongTest(
        "bill-of-materials",
        "The image's bill of materials names every package that is in the image.",
        ("docker/sbom", "docker/build", "docker/Dockerfile", "uv.lock", "tests/long/bill_of_materials.py"),
        suite("tests/long/bill_of_materials.py"),
        cluster=True,
    ),
    LongTest(
        "signed-image",
        "A signed image is deployed; one that is unsigned, replaced, or without an attestation is refused.",
        (
            *(f"docker/{name}" for name in ("build", "sbom", "sign")),
            "orchestration/operations/image_signature.py",
            "tests/docker/signing.py",
            "tests/long/signed_image.py",
        ),
        suite("tests/long/signed_image.py"),
    ),
    LongTest(
        "benchmarks",
        "Each benchmark runs to its end in its smallest size and appends its figures.",
        (
            *(f"tests/benchmarks/{name}.py" for name in (*benchmarks.SMALLEST, "processes", "table")),
            "tests/long/benchmarks.py",
        ),
        suite("tests/long/benchmarks.py"),
        cluster=True,
    ),
)
