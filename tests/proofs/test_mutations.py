"""The classic ways to get BLIP-2 and guided compression wrong, planted one at a time: each must fail its named test.

A copy of the package gets one change; the named test runs against the copy in a process of its own. Without the change
the same test passes, which the ordinary suite shows.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Mutation:
    file: str
    right: str
    wrong: str
    test: str


UNIT = "tests/unit"
MUTATIONS = {
    "a_own_pair_may_be_drawn_as_negative": Mutation(
        "losses/matching.py",
        "logits_BG.float().masked_fill(forbidden_BG, -torch.inf).softmax(1)",
        "logits_BG.float().softmax(1)",
        f"{UNIT}/losses/test_matching.py::test_a_positive_is_never_drawn",
    ),
    "b_itg_mask_bidirectional": Mutation(
        "models/qformer.py",
        "text_BTT = keys_BT.unsqueeze(1) & order",
        "text_BTT = keys_BT.unsqueeze(1) & torch.ones_like(order)",
        f"{UNIT}/models/test_qformer.py::test_one_pass_and_cached_generation_agree",
    ),
    "c_smoothing_dropped_from_itc": Mutation(
        "losses/contrastive.py",
        "return -(1 - smoothing) * hit_B - smoothing *",
        "return -hit_B - 0.0 *",
        f"{UNIT}/losses/test_contrastive.py::test_perfect_separation_reaches_the_smoothing_floor",
    ),
    "c_smoothing_dropped_from_itg": Mutation(
        "losses/language.py",
        "label_smoothing=smoothing",
        "label_smoothing=0.0",
        f"{UNIT}/losses/test_language_loss.py::test_smoothing_leaves_its_floor_and_nothing_lower",
    ),
    "d_queries_start_at_zero": Mutation(
        "models/qformer.py",
        "        self.copy_text_ffn()\n\n    def copy_text_ffn",
        "        nn.init.zeros_(self.queries)\n        self.copy_text_ffn()\n\n    def copy_text_ffn",
        f"{UNIT}/models/test_qformer.py::test_start_copies_the_text_ffn_and_draws_the_queries",
    ),
    "e_labels_not_shifted": Mutation(
        "losses/language.py",
        "targets_BT = labels_BT[:, 1:]",
        "targets_BT = labels_BT[:, :-1]",
        f"{UNIT}/losses/test_language_loss.py::test_label_t_plus_1_is_asked_of_position_t",
    ),
    "e_labels_not_shifted_in_stage_2": Mutation(  # and all positions fed, so that the shapes still fit
        "models/language.py",
        "hidden = self._hidden(prefix_BQL[rows], ids[:, :-1], mask[:, :-1])[:, queries - 1 :]",
        "hidden = self._hidden(prefix_BQL[rows], ids, mask)[:, queries:]",
        f"{UNIT}/models/test_language.py::test_the_loss_is_the_whole_model_s_own",
    ),
    "f_gather_order_permuted_across_ranks": Mutation(
        "training/comm.py",
        "    _all_gather(out, x.contiguous(), group=group)\n    return out",
        "    _all_gather(out, x.contiguous(), group=group)\n    return out.roll(len(x), 0)",
        "tests/distributed/test_comm.py::test_gather_concatenates_in_rank_order_and_sums_gradients",
    ),
    "g_padding_not_masked": Mutation(
        "models/qformer.py",
        "    keys_BT = mask.bool()",
        "    keys_BT = torch.ones_like(mask.bool())",
        f"{UNIT}/models/test_qformer.py::test_longer_padding_changes_nothing",
    ),
    "h_ranks_counted_optimistically_images": Mutation(
        "evaluation/retrieval.py",
        "ahead = (scores_C[wrong].unsqueeze(0) >= right",
        "ahead = (scores_C[wrong].unsqueeze(0) > right",
        f"{UNIT}/evaluation/test_retrieval.py::test_a_model_that_says_the_same_of_everything_recalls_nothing",
    ),
    "h_ranks_counted_optimistically_captions": Mutation(
        "evaluation/retrieval.py",
        "(sims_RN >= sims_RN.gather(1, own_R1)).sum(dim=1)",
        "1 + (sims_RN > sims_RN.gather(1, own_R1)).sum(dim=1)",
        f"{UNIT}/evaluation/test_retrieval.py::test_a_model_that_says_the_same_of_everything_recalls_nothing",
    ),
    "i_a_text_guides_what_the_contrast_sees": Mutation(
        "methods/guided.py",
        "seen = streams.image.finish(trunk, steps)  # without",
        "seen = streams.look(trunk, steps, streams.text(ids, mask), mask)  # without",
        f"{UNIT}/methods/test_guided.py::test_an_image_s_vectors_are_bit_identical_whatever_its_text",
    ),
    "j_kept_tokens_lose_their_order": Mutation(
        "models/compression.py",
        "return order_BN[:, :kept].sort(1).values,",
        "return order_BN[:, :kept],",
        f"{UNIT}/models/test_compression.py::test_the_highest_scores_stay_in_their_old_order_and_the_rest_is_their_weighted_mean",
    ),
    "k_fused_weights_not_renormalised": Mutation(
        "models/compression.py",
        "weights = distribution(scores_BN.gather(1, drop))",
        "weights = scores_BN.gather(1, drop)",
        f"{UNIT}/models/test_compression.py::test_identical_tokens_are_fused_into_that_token",
    ),
    "l_special_tokens_count_as_words": Mutation(
        "losses/local.py",
        "best_BGK = sims.float().masked_fill(~words_GT[None, :, None, :], -torch.inf).amax(3)",
        "best_BGK = sims.float().amax(3)",
        f"{UNIT}/losses/test_local.py::test_padding_and_special_tokens_have_no_say",
    ),
}


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_the_code_still_holds_what_the_mutation_changes(name: str, repository: Path) -> None:
    mutation = MUTATIONS[name]
    text = (repository / "platform" / "isthmus" / mutation.file).read_text()
    assert text.count(mutation.right) == 1
    file, _, function = mutation.test.partition("::")
    assert f"def {function.partition('[')[0]}(" in (repository / file).read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_the_mutation_is_caught(name: str, repository: Path, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    source = tmp_path / "platform"
    shutil.copytree(repository / "platform", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    file = source / "isthmus" / mutation.file
    text = file.read_text()
    assert text.count(mutation.right) == 1, f"{mutation.file} no longer holds what this mutation changes"
    file.write_text(text.replace(mutation.right, mutation.wrong))
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.test],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1, found.stdout[-3000:] + found.stderr[-1000:]  # 1: tests ran, and some failed
    assert "AssertionError" in found.stdout or "Failed:" in found.stdout, found.stdout[-3000:]
