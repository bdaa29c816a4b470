# SPDX-License-Identifier: Apache-2.0
"""The Helm chart: rendered for six sets of values, checked against Kubernetes' schema and against the image."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vllm_retrieval_attn.core.config import parse

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/vllm-retrieval"
SETS = sorted(path.stem for path in (CHART / "ci").glob("*.yaml"))
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "RayCluster"}
"""Kinds of operators, whose schemas Kubernetes has not."""
HELM = shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")
CHECKOV = shutil.which("checkov", path=str(Path(sys.executable).parent.parent / "policy/bin")) or shutil.which(
    "checkov"
)

pytestmark = pytest.mark.skipif(HELM is None, reason="no helm here (make tools fetches it)")


def helm(*arguments, values=None, **more):
    given = [f"--values={CHART / 'ci' / values}.yaml"] if values else []
    return subprocess.run(
        [HELM, *arguments, str(CHART), *given, *more.get("sets", ())], capture_output=True, text=True, timeout=60
    )


def rendered(values, *sets):
    done = helm("template", "release", values=values, sets=sets)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def pod(documents):
    (one,) = (one for one in documents if one["kind"] in ("Deployment", "RayCluster"))
    return one["spec"].get("headGroupSpec", one["spec"])["template"]["spec"]


def server(documents):
    """The container that serves."""
    (container,) = (one for one in pod(documents)["containers"] if one["name"] == "vllm")
    return container


def test_there_are_six_sets_and_lint_finds_nothing():
    assert len(SETS) >= 6
    for values in SETS:
        done = helm("lint", "--strict", values=values)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("values", SETS)
def test_what_is_rendered_is_valid_kubernetes(values):
    validate = pytest.importorskip("kubernetes_validate")
    for document in rendered(values):
        assert document["metadata"]["namespace"]
        if document["kind"] not in CUSTOM:
            validate.validate(document, "1.37", strict=True)


@pytest.mark.parametrize("values", SETS)
def test_the_pods_memory_holds_what_the_server_will_take(values):
    given = {
        **yaml.safe_load((CHART / "values.yaml").read_text()),
        **yaml.safe_load((CHART / "ci" / f"{values}.yaml").read_text()),
    }
    found = server(rendered(values))
    (knobs,) = (one.partition("=")[2] for one in found["args"] if one.startswith("--additional-config="))
    assert parse(json.loads(knobs)).host_memory_gb == given["retrieval"]["hostMemoryGb"]
    limit = int(re.fullmatch(r"(\d+)Gi", found["resources"]["limits"]["memory"]).group(1))
    assert limit >= math.ceil(given["retrieval"]["hostMemoryGb"] * 1e9 / 2**30) + 7
    assert found["resources"]["requests"] == found["resources"]["limits"]


@pytest.mark.parametrize("values", SETS)
def test_the_pod_is_what_the_image_has_and_no_more(values):
    """Users, ports and files of the Dockerfile; nothing privileged; grace for all that ends."""
    documents, docker = rendered(values), (ROOT / "Dockerfile").read_text()
    spec, container = pod(documents), server(documents)
    assert f"USER {spec['securityContext']['runAsUser']}" in docker
    assert f"EXPOSE {container['ports'][0]['containerPort']}" in docker
    assert 'ENTRYPOINT ["vllm", "serve"]' in docker
    assert "command" not in container
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert spec["securityContext"]["runAsNonRoot"]
    assert not spec["automountServiceAccountToken"]
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/dev/shm", "/tmp", "/cache"}
    places = {one["name"]: one.get("value") for one in container["env"]}
    for name in ("HOME", "VLLM_RETRIEVAL_CACHE", "HF_HOME", "VLLM_CACHE_ROOT"):
        assert any(places[name].startswith(path) for path in writable)
    (timeout,) = (int(one.partition("=")[2]) for one in container["args"] if one.startswith("--shutdown-timeout="))
    assert spec["terminationGracePeriodSeconds"] >= timeout + 10 + 25
    assert container["readinessProbe"]["httpGet"]["path"] == "/retrieval/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/health"


def test_a_ray_cluster_is_one_pod_whose_containers_share_what_ray_needs():
    """The pod itself is checked as a Deployment's would be: KubeRay's kind has no schema here."""
    validate = pytest.importorskip("kubernetes_validate")
    documents = rendered("ray-cluster")
    assert "Deployment" not in {one["kind"] for one in documents}
    spec = pod(documents)
    head, serving = spec["containers"]
    assert (head["name"], serving["name"]) == ("ray", "vllm")  # KubeRay takes the first one for Ray
    assert head["image"] == serving["image"]
    assert head["volumeMounts"] == serving["volumeMounts"]  # Ray's sockets lie in /tmp, its store in /dev/shm
    assert spec["shareProcessNamespace"]
    assert head["securityContext"] == serving["securityContext"]
    (knobs,) = (one.partition("=")[2] for one in serving["args"] if one.startswith("--additional-config="))
    read = parse(json.loads(knobs))
    assert (read.ray_address, read.threads) == ("auto", head["resources"]["limits"]["cpu"])
    tokens = [one for part in (head, serving) for one in part["env"] if one["name"] == "RAY_AUTH_TOKEN"]
    assert tokens[0] == tokens[1]
    template = {"metadata": {"labels": {"a": "b"}}, "spec": spec}
    deployment = {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"},
        "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": template},
    }  # fmt: skip
    validate.validate(deployment, "1.37", strict=True)


@pytest.mark.skipif(CHECKOV is None, reason="no checkov here (make tools installs it)")
def test_the_policy_check_finds_nothing_that_is_not_explained(tmp_path):
    """deploy/helm/policy.yaml lists what is left out, each with its reason."""
    for values in SETS:
        done = helm("template", "release", "--namespace=serving", values=values)
        (tmp_path / f"{values}.yaml").write_text(done.stdout)
    command = [CHECKOV, "--config-file", str(ROOT / "deploy/helm/policy.yaml"), "--directory", str(tmp_path)]
    done = subprocess.run([*command, "--output=json"], capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    failed = [(one["check_id"], one["resource"]) for one in found["results"]["failed_checks"]]
    assert failed == []
    assert found["summary"]["passed"] > 60 * len(SETS)
    assert found["summary"]["parsing_errors"] == 0


def test_rules_and_dashboard_are_those_of_deploy_monitoring():
    documents = {one["kind"]: one for one in rendered("gpu-80gb")}
    rules = yaml.safe_load((ROOT / "deploy/monitoring/alerts.yaml").read_text())
    assert documents["PrometheusRule"]["spec"] == rules
    dashboard = json.loads(documents["ConfigMap"]["data"]["vllm-retrieval.json"])
    assert dashboard == json.loads((ROOT / "deploy/monitoring/dashboard.json").read_text())
    query = documents["ScaledObject"]["spec"]["triggers"][0]["metadata"]["query"]
    assert query == 'sum(vllm:num_requests_waiting{namespace="default", service="release-vllm-retrieval"})'


def test_the_plain_manifests_are_what_the_chart_renders():
    plain = (ROOT / "deploy/kubernetes/server.yaml").read_text()
    command = next(line for line in plain.splitlines() if "helm template" in line).split()
    done = helm("template", "server", sets=command[command.index("--set") :])
    assert list(yaml.safe_load_all(plain)) == list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["--set", "model="], "/model"),
        (["--set", "modell=x"], "modell"),
        (["--set", "retrieval.hostMemoryGB=3"], "hostMemoryGB"),
        (["--set", "retrieval.hostMemoryGb=0"], "hostMemoryGb"),
        (["--set", "resources.memoryGi=20"], "can not hold retrieval.hostMemoryGb=40"),
        (["--set", "retrieval.knobs.host_memory_gb=3"], "set retrieval.hostMemoryGb"),
        (["--set", "gpus=2"], "gpus=2 is not tensorParallel=1"),
        (["--set", "autoscaling.kind=magic"], "autoscaling"),
        (["--set", "resources.shmGi=0"], "shmGi"),
        (["--set", "image.digest=latest"], "digest"),
        (["--set", "ray.cluster=true"], "ray.cluster wants ray.tokenSecret"),
        (["--set", "ray.cluster=true,ray.tokenSecret=t,replicas=2"], "ray.cluster has one pod"),
        (["--set", "ray.cluster=true,ray.tokenSecret=t,ray.cpus=16"], "ray.cpus=16 leaves none of resources.cpus"),
    ],
)
def test_values_that_can_not_be_are_refused_with_a_sentence(sets, said):
    done = helm("template", "release", values="gpu-24gb", sets=sets)
    assert done.returncode != 0
    assert said in done.stderr
