"""The Gluon kernels compile for sm_90 with both Tritons and are what they should be, on a machine without a GPU (gluon_gate.py).

A second run takes what Triton compiled from the cache folder.
"""

import json
import os
import subprocess
import sys

import gluon_gate
import pytest
from gate import PACKAGE
from test_gate import CACHE, pinned_triton  # noqa: F401 (one is a fixture)

pytest.importorskip("triton.experimental.gluon")


def results(triton_path):
    paths = [str(triton_path)] if triton_path else []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(CACHE / "gluon-gate"), "PYTHONPATH": os.pathsep.join([*paths, str(PACKAGE.parent)])}
    done = subprocess.run([sys.executable, gluon_gate.__file__], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]


def assert_no_faults(found):
    assert len(found) == 7
    assert [fault for result in found for fault in gluon_gate.faults(result)] == []


def test_every_gluon_configuration_passes_with_the_installed_triton():
    assert_no_faults(results(None))


def test_every_gluon_configuration_passes_with_the_pinned_triton(pinned_triton):  # noqa: F811
    found = results(pinned_triton)
    assert_no_faults(found)
    assert pinned_triton is None or {result["triton"] for result in found} == {"3.6.0"}


GOOD = {
    "name": "x backward", "triton": "0", "registers": 168, "stack": 0, "shared": 232448, "warps": 12, "HGMMA": 1, "UTMALDG": 1,
    "USETMAXREG": 1, "REDG.E.ADD.F32x2": 32, "asynchronous waits": 4, "unsynchronized arrivals": 0, "fenced stores": 2,
    "acquires": 2, "releases": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"shared": 232449}, "232449 bytes of shared memory"),
        ({"stack": 8}, "spills 8 bytes"),
        ({"registers": 176}, "176 registers in 12 warps"),
        ({"HGMMA": 0}, "has no HGMMA"),
        ({"UTMALDG": 0}, "has no UTMALDG"),
        ({"USETMAXREG": 0}, "has no USETMAXREG"),
        ({"asynchronous waits": 0}, "nothing runs beside the exponentials"),
        ({"unsynchronized arrivals": 1}, "1 arrivals at barriers"),
        ({"fenced stores": 1}, "1 fenced stores of dS"),
        ({"acquires": 0}, "0 acquires and 1 releases"),
        ({"releases": 0}, "2 acquires and 0 releases"),
        ({"REDG.E.ADD.F32x2": 0}, "has no REDG.E.ADD.F32x2"),
    ],
    ids=str,
)
def test_the_gate_finds(change, fault):
    assert list(gluon_gate.faults(GOOD)) == []
    (found,) = gluon_gate.faults(GOOD | change)
    assert fault in found


def test_an_arrival_before_all_warps_are_there_is_seen():
    wait, sync = "wgmma.wait_group.sync.aligned 0;\n", "bar.sync 0, 128;\n"
    arrive = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];\n"
    assert gluon_gate.unsynchronized_arrivals(wait + sync + arrive) == 0
    assert gluon_gate.unsynchronized_arrivals(sync + wait + arrive) == 1
    for work in ("ld.shared.b32 %r1, [%r2];\n", "st.shared.b32 [%r2], %r1;\n", "red.global.gpu.relaxed.add.v2.f32 [%rd1], {};\n"):
        assert gluon_gate.unsynchronized_arrivals(work + sync + arrive) == 0
        assert gluon_gate.unsynchronized_arrivals(sync + work + arrive) == 1


def test_a_store_without_a_fence_is_seen():
    store, fence = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {};\n", "fence.proxy.async.shared::cta;\n"
    arrive = "bar.sync 0, 128;\n@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];\n"
    assert gluon_gate.fenced_stores((store * 4 + fence + arrive) * 2) == 2
    assert gluon_gate.fenced_stores(store * 4 + fence + arrive + store * 4 + arrive + fence) == 1
