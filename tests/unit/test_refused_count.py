# SPDX-License-Identifier: Apache-2.0
"""How many wrong configurations, environments and requests are tried: what the README says of them stands on this."""

import pytest

pytest.importorskip("vllm")

from tests.e2e import test_refused_at_start as at_start
from tests.e2e import test_refused_models as models
from tests.one_line import cases
from tests.unit import test_admission as requests
from tests.unit import test_config as knobs
from tests.unit import test_doctor_checks as doctor
from tests.unit import test_refused_commands as commands
from tests.unit import test_refused_environments as environments

TRIED = {
    "knobs": (
        knobs.test_a_bad_knob_is_refused_in_one_line_that_names_it,
        knobs.test_a_value_of_another_kind_is_refused_with_the_kind_it_should_be,
        knobs.test_knobs_in_a_wrong_place_are_refused_with_the_right_one,
    ),
    "vLLM's options": (at_start.test_refused_with_one_line,),
    "models": (
        models.test_a_model_is_refused_by_its_configuration,
        models.test_a_layer_refuses_what_the_configuration_did_not_tell,
        models.test_codes_on_the_gpu_are_refused_for_what_their_kernels_can_not,
        models.test_what_no_small_model_shows_here,
    ),
    "environments": (
        environments.test_keys_that_can_not_work_stop_the_start,
        environments.test_memory_that_is_not_there,
        environments.test_a_ray_that_does_not_answer,
        environments.test_a_cache_folder_that_is_none_is_named_by_the_doctor,
    ),
    "commands": (
        commands.test_wrong_arguments_are_answered,
        commands.test_what_vllm_refuses_is_told_in_its_first_line_that_says_something,
    ),
    "requests": (
        requests.test_a_wrong_argument_of_a_request_is_refused_in_one_line,
        requests.test_numbers_beyond_all_bounds_are_refused_as_wrong_values,
    ),
}
LEAST = {"knobs": 60, "vLLM's options": 20, "models": 20, "environments": 20, "commands": 60, "requests": 20}


@pytest.mark.parametrize("kind", TRIED)
def test_so_many_are_tried_of_each_kind(kind):
    assert sum(map(cases, TRIED[kind])) >= LEAST[kind]


def test_sixty_wrong_configurations_and_environments_at_least():
    kinds = ("vLLM's options", "models", "environments")  # without knobs, of which there are as many again
    assert sum(cases(test) for kind in kinds for test in TRIED[kind]) >= 60


def test_the_doctor_stops_or_warns_in_every_way_that_is_tried():
    found = [verdict for _, _, verdict, _ in doctor.CASES.values()]
    assert sum(verdict is not doctor.Verdict.OK for verdict in found) >= 10


if __name__ == "__main__":
    for name, tests in TRIED.items():
        print(name, sum(map(cases, tests)))
