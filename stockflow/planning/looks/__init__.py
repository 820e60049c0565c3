"""Looks: what is remarked on recipe, checkpoints and jobs before anything is merged, a module per subject.

A look is a pure function that yields remarks; it sees headers, configs and what else was read of each model.
"""

from collections.abc import Callable, Iterable

from stockflow.planning.looks import (
    adapters,
    asked,
    configs,
    cutting,
    doubled,
    experts,
    files,
    filters,
    kinship,
    layers,
    placeholders,
    precision,
    promises,
    quantised,
    sizes,
    ties,
    tokenizers,
    uses,
    values,
    words,
)
from stockflow.planning.looks.proposal import Proposal
from stockflow.text.remarks import Remark

LOOKS: tuple[Callable[[Proposal], Iterable[Remark]], ...] = (
    values.unmerged,
    values.without_effect,
    asked.snapshots,
    asked.over_http,
    placeholders.placeholders,
    asked.skipped_tensors,
    values.far_values,
    values.shared_gradients,
    layers.modules_left_out,
    layers.layers_in_config,
    asked.missing_tokenizer,
    asked.missing_config,
    files.omitted_files,
    files.missing_files,
    files.untaken_files,
    asked.unlisted_base,
    asked.promoted_dtypes,
    filters.unmatched_rules,
    filters.unmatched_filters,
    filters.shadowed_filters,
    filters.filters_within_numbers,
    filters.seed,
    configs.missing_configs,
    precision.kept_precision,
    precision.cast_unlike,
    precision.carried_indices,
    precision.running_statistics,
    precision.narrower_range,
    experts.merged_routers,
    experts.single_units,
    experts.kept_parts,
    promises.missing_layers,
    promises.missing_towers,
    promises.layers_of_experts,
    promises.missing_predictions,
    promises.wrapped_names,
    promises.wrapped_by_adapters,
    promises.training_state,
    promises.mixed_predictions,
    promises.nonfinite_values,
    sizes.broken_sizes,
    sizes.broken_biases,
    ties.own_heads,
    ties.parted_pairs,
    ties.contradicting_flags,
    doubled.contradicting_configs,
    ties.stale_copies,
    ties.missing_heads,
    quantised.removed_quantization,
    quantised.read_codes,
    quantised.quantised_tunes,
    quantised.static_scales,
    quantised.averaged_scales,
    quantised.leftover_scales,
    adapters.known_changes,
    adapters.factors_inside,
    precision.not_finite,
    kinship.copies,
    kinship.strangers,
    kinship.small_changes,
    kinship.zeros,
    tokenizers.differing_vocabularies,
    cutting.other_cutting,
    tokenizers.tokens_beyond_rows,
    tokenizers.missing_tokenizers,
    words.words_of_no_tune,
    words.templates_going_out,
    uses.uses_of_no_tune,
    uses.vocabularies_of_parts,
    uses.contradicting_files,
    uses.contradicting_templates,
    uses.ends_of_texts,
    uses.ends_of_turns,
)
"""In the order in which their remarks are shown."""


def remarks_on(proposal: Proposal) -> tuple[Remark, ...]:
    """Return all remarks: those of the recipe, those of each checkpoint, and what the looks find."""
    own = (*proposal.recipe.remarks, *(remark for each in proposal.checkpoints for remark in each.remarks))
    found = [remark for look in LOOKS for remark in look(proposal)]
    unkept = {key for remark in found if remark.code == "promise-unkept" for key in remark.values}
    return (*own, *found, *configs.differing_configs(proposal, unkept))
