from __future__ import annotations

from limoe_dist.config.templates import CLIP_80, expanded, problems


def test_clip_s_set_is_80_different_prompts_each_with_one_place_for_the_name() -> None:
    assert len(CLIP_80) == len(set(CLIP_80)) == 80
    assert {template.count("{}") for template in CLIP_80} == {1}
    assert {template.strip() for template in CLIP_80} == set(CLIP_80)


def test_a_set_s_name_stands_for_its_prompts_in_place() -> None:
    assert expanded(("{}", "clip", "an emoji of {}")) == ("{}", *CLIP_80, "an emoji of {}")


def test_what_is_neither_a_prompt_nor_a_set_is_named() -> None:
    assert problems(("{}", "clip")) == []
    (found,) = problems(("{}", "Clip"))
    assert '"Clip" must hold {} where the class name goes' in found
    assert "clip" in found
    assert "is empty" in problems(())[0]
