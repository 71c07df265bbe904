from __future__ import annotations

import pytest
from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3

from envs.metaworld_tasks import INSTRUCTIONS, MT10, choose_tasks
from research.errors import UserError


def test_the_tasks_and_their_lists_are_meta_worlds_own():
    assert set(INSTRUCTIONS) == set(ALL_V3_ENVIRONMENTS) and len(INSTRUCTIONS) == 50
    assert tuple(MT10_V3) == MT10 == choose_tasks("MT10")
    assert choose_tasks("MT50") == tuple(ALL_V3_ENVIRONMENTS)


def test_an_instruction_tells_its_task_from_all_others_and_fits_into_64_bytes():
    phrasings = [text for texts in INSTRUCTIONS.values() for text in texts]
    assert len(set(phrasings)) == len(phrasings) == 4 * 50
    assert max(len(text.encode()) for text in phrasings) <= 64


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("reach-v4", "no task 'reach-v4'; did you mean 'reach-v3'?"),
        (["push-v3", "dor-open-v3"], "did you mean 'door-open-v3'?"),
        ("MT5", "did you mean 'MT50'?"),
        ("qqqq", "there are assembly-v3, "),
        (["push-v3", "push-v3"], "named twice"),
        ([], "expected a task, a list of tasks"),
        (3, "expected a task, a list of tasks"),
        ([3], "expected a task, a list of tasks"),
    ],
)
def test_a_name_that_is_no_task_is_refused_with_the_nearest(task, says):
    with pytest.raises(UserError, match=r"^trainer\.env_config\.task: .*") as refused:
        choose_tasks(task)
    assert says in str(refused.value)
