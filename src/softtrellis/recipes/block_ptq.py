"""Whole models, decoder layer by decoder layer: only one of them is on the device at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softtrellis.io.progress import progress
from softtrellis.modules.blocks import Blocks
from softtrellis.modules.experts import expert_groups
from softtrellis.modules.replace import (
    decoder_index,
    get_linear,
    get_quantized,
    head_name,
    replace_modules,
    share_codebooks_,
    weights_held,
)
from softtrellis.modules.unify import linear_of
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.recipes.calibration import (
    InputMoments,
    SecondMoment,
    check_moment,
    paired_moments,
    watch_inputs,
)
from softtrellis.recipes.expert_hessians import fill_sparse_hessians
from softtrellis.recipes.finetune import FineTuneConfig, tune_block
from softtrellis.recipes.group import LayerReport, quantize_group
from softtrellis.recipes.progressive import Progressive
from softtrellis.recipes.ptq_state import LayerStore
from softtrellis.recipes.ranks import ONE, Ranks

if TYPE_CHECKING:
    from softtrellis.recipes.ptq import QuantizeConfig


@dataclass(frozen=True, eq=False)
class _Work:
    """A decoder layer that is to be quantized.

    Attributes:
        index: of the decoder layer, which is on the device.
        names: of its layers that are quantized.
        moments: of their inputs, from the whole calibration text.
        states: [n, ctx, d], what enters it.
        targets: [n, ctx, d], what it should make of that, where blocks are tuned.
        before: a copy of it, where weights are corrected.
        original: [n, ctx, d], what enters it in the original model, likewise.
    """

    index: int
    names: list[str]
    moments: InputMoments
    states: Tensor
    targets: Tensor | None
    before: nn.Module | None
    original: Tensor | None


class BlockQuantizer:
    """Quantizes the named linear layers of a model, which is changed in place.

    Attributes:
        reports: by layer.
        filled: experts that saw too few tokens, and took the Hessian of those beside them.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        windows: Tensor | None,
        config: QuantizeConfig,
        fine_tune: FineTuneConfig | None,
        store: LayerStore,
        ranks: Ranks = ONE,
        progressive: Progressive | None = None,
        outputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        """``windows`` int64 [n, ctx] is None where neither Hessians nor tuning are wanted.

        With several ``ranks`` each runs its share of the windows; without ``fine_tune`` and
        ``progressive``, which trains what lies behind every layer. ``outputs`` are Hessians
        [out, out] of layers' outputs by name, for ``two_sided_ldlq``.
        """
        self.progressive, self.outputs = progressive, outputs or {}
        self.ranks = ranks
        self.model, self.names, self.config = model, list(names), config
        self.fine_tune, self.store = fine_tune, store
        self.device = torch.device(config.device)
        self.bits = config.bits_of(model, names)
        self.head = None if config.head_bits is None else head_name(model)
        if self.head is not None and config.head_bits is not None:
            self.bits[self.head] = config.head_bits
        codes = {config.code_for(bits) for bits in self.bits.values()}
        self.codebooks: dict[TrellisCode, Tensor] = {
            code: code.codebook().to(self.device) for code in codes
        }
        self.blocks: Blocks | None = None
        if windows is not None:
            self.blocks = Blocks(
                model,
                windows[ranks.part(len(windows))],
                device=self.device,
                batch=config.windows_at_once(model, names),
                autocast=torch.bfloat16 if self.device.type == "cuda" else None,
            )
        self.corrected = config.inputs == "corrected" and config.error_feedback
        self.reports: dict[str, LayerReport] = {}
        self.filled: set[str] = set()

    def run(self) -> None:
        """Quantizes all layers, or goes on where the store ends."""
        by_layer: dict[int, list[str]] = {}
        for name in self.names:
            by_layer.setdefault(decoder_index(self.model, name), []).append(name)
        last = max(by_layer)
        if self.head is not None and self.blocks is not None:
            last = len(self.blocks.layers) - 1
        states = original = None
        if self.blocks is not None:
            states = self.blocks.states
            self.blocks.states = states[:0]  # not held once the next layer's are known
            if self.corrected or (self.fine_tune is not None and self.config.inputs != "original"):
                original = states.clone()
        with progress(len(self.names), "quantize", enabled=self.config.show_progress) as bar:
            for index in range(last + 1):
                names = by_layer.get(index, [])
                if states is None:
                    self._weights_only(names)
                else:
                    states, original = self._layer(index, names, states, original)
                    if self.progressive is not None and names and index < last:
                        self.progressive.after(index)
                        original = None if original is None else states.clone()
                bar.update(len(names))
        if self.head is not None:
            self._quantize_head(self.head, states)
            self.names.append(self.head)
        share_codebooks_(self.model)

    def _layer(
        self, index: int, names: list[str], states: Tensor, original: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One decoder layer; returns what enters the next one, in both streams, in their place.

        ``states`` is what the layer's Hessians are taken from. ``original`` is what would enter it
        if nothing had been quantized, where weights are corrected or blocks tuned towards that.
        """
        assert self.blocks is not None
        with self.blocks.on_device(index) as layer:
            done = self.ranks.agree(self.store.has(index))
            quantizing = bool(names) and not done
            before = copy.deepcopy(layer) if quantizing and self.corrected else None
            targets, moments, output = None, None, None
            if original is not None and (before is None or self.fine_tune is not None):
                place = original if before is None else None
                targets = self.blocks.run_all(index, original, out=place)
            if quantizing:
                linears, wanted, sample = self._linears(index), names, states
                if self.corrected:  # the others' moments are taken one group after the other
                    experts = expert_groups(self.model, names).values()
                    wanted = [name for group in experts for name in group]
                    sample = states if wanted else states[: self.blocks.batch]
                moments, output = watch_inputs(self.blocks, index, sample, linears, wanted)
                moments.add_up(self.ranks, self.device)
            elif self.config.inputs == "original":
                output = self.blocks.run_all(index, states)
            if done:
                self.reports |= self.store.load(index, layer, self.codebooks)
            elif moments is not None:
                goal = output if original is None else targets
                work = _Work(index, names, moments, states, goal, before, original)
                if self._quantize(work):
                    targets = original
                reports = {name: self.reports[name] for name in names}
                if self.ranks.first:
                    self.store.save(index, layer, reports)
            moments = None
            if self.config.inputs == "original":
                assert output is not None
                return output, None
            output = None
            if original is not None and targets is None:
                targets = self.blocks.run_all(index, original, layer=before, out=original)
            with weights_held(layer):
                return self.blocks.run_all(index, states, out=states), targets

    def _linears(self, index: int) -> dict[str, nn.Linear]:
        assert self.blocks is not None
        prefix, layer = f"{self.blocks.prefix}.{index}.", self.blocks.layers[index]
        return {f"{prefix}{n}": m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}

    def _quantize(self, work: _Work) -> bool:
        """Whether the original states have become what leaves the original layer meanwhile."""
        assert self.blocks is not None
        moments, names = work.moments, work.names
        experts = expert_groups(self.model, names)
        of_experts = self._expert_hessians(moments, experts)
        left, tuned, advanced = list(names), False, False
        for group, tune in _tuning_order(moments.groups(names), experts):
            first = group[0]
            leader = moments.leaders.get(first, first)
            hessian, cross, tokens = None, None, moments.tokens(first)
            if self.config.error_feedback and first in of_experts:
                hessian = of_experts[first]
            elif self.config.error_feedback and work.before is None:
                hessian = moments.hessian(first)
            elif self.config.error_feedback and first in moments.leaders:
                advanced = self.fine_tune is None and len(group) == len(left)
                hessian, cross, tokens = self._paired(work, leader, advance=advanced)
            if tuned:
                cross = None  # these weights make up for the others' errors already
            self._group(group, leader, hessian, tokens, cross)
            left = [name for name in left if name not in group]
            if self.fine_tune is not None and tune:
                linears, tuned = [get_linear(self.model, name) for name in left], True
                goal = work.targets
                assert goal is not None
                tune_block(self.blocks, work.index, work.states, goal, self.fine_tune, linears)
        return advanced

    def _paired(self, work: _Work, leader: str, *, advance: bool) -> tuple[Tensor, Tensor, int]:
        """The moments of a layer's inputs as they are now, with the original ones, and tokens."""
        assert self.blocks is not None
        assert work.before is not None
        assert work.original is not None
        name = leader.removeprefix(f"{self.blocks.prefix}.{work.index}.")
        with weights_held(self.blocks.layers[work.index]):
            hessian, cross = paired_moments(
                self.blocks,
                work.index,
                work.states,
                work.before,
                work.original,
                name,
                self.ranks,
                advance=advance,
            )
        for moment in (hessian, cross):
            check_moment(moment, leader)
        (tokens,) = self.ranks.sum(work.states.shape[:2].numel())
        return hessian, cross, int(tokens)

    def _expert_hessians(
        self, moments: InputMoments, groups: dict[str, list[str]]
    ) -> dict[str, Tensor | None]:
        """Of experts: their own Hessians, or of all beside them for those that saw few tokens."""
        experts = [name for group in groups.values() for name in group]
        counts = {name: moments.tokens(name) for name in experts}
        own = {name: moments.hessian(name) for name in experts if counts[name]}
        known = {name: hessian for name, hessian in own.items() if hessian is not None}
        filled = fill_sparse_hessians(known, counts, groups, least=self.config.expert_tokens)
        self.filled |= set(filled)
        return {name: known.get(name) for name in experts}

    def _group(
        self,
        names: list[str],
        leader: str,
        hessian: Tensor | None,
        tokens: int,
        cross: Tensor | None = None,
    ) -> None:
        config = self.config
        linears = {name: get_linear(self.model, name) for name in names}
        found = quantize_group(
            linears,
            hessian,
            {n: config.layer_format(linear, self.bits[n]) for n, linear in linears.items()},
            self.codebooks,
            leader=leader,
            cross=cross,
            outputs=self._outputs_of(linears) if hessian is not None else None,
            tokens=tokens,
            damping=config.damping,
            correction_damping=config.correction_damping,
            output_damping=config.output_damping,
            seed=config.seed,
            backend=config.backend,
            ranks=self.ranks,
        )
        for name, (_, report) in found.items():
            self.reports[name] = replace(report, borrowed=name in self.filled)
        replace_modules(self.model, names, lambda name, _: found[name][0])

    def _outputs_of(self, linears: dict[str, nn.Linear]) -> dict[str, Tensor] | None:
        """The outputs' Hessians, the identity for an expert that no token reached."""
        if self.outputs.keys().isdisjoint(linears):
            return None
        return {
            name: self.outputs[name] if name in self.outputs else torch.eye(linear.out_features)
            for name, linear in linears.items()
        }

    def _quantize_head(self, name: str, states: Tensor | None) -> None:
        """The output layer, which is not tied to the embedding afterwards."""
        settings: Any = self.model.config
        settings.tie_word_embeddings = False
        head = get_linear(self.model, name)
        untied = linear_of(head.weight, head.bias, like=head)
        replace_modules(self.model, [name], lambda *_: untied)
        if self.blocks is None or states is None:
            self._weights_only([name])
            return
        place, holder = len(self.blocks.layers), nn.ModuleDict({"head": untied})
        if self.ranks.agree(self.store.has(place)):
            self.reports |= self.store.load(place, holder, self.codebooks)
            replace_modules(self.model, [name], lambda *_: holder["head"])
            return
        hessian, tokens = None, 0
        if self.config.error_feedback:
            moment = SecondMoment(head.in_features, self.device)
            for part in self.blocks.last_hidden(states).split(1):
                moment.add(part)
            moment.add_up(self.ranks)
            hessian, tokens = moment.mean(), moment.count
        untied.to(self.device)
        self._group([name], name, hessian, tokens)
        made = get_quantized(self.model, name).to(states.device)
        if self.ranks.first:
            self.store.save(place, nn.ModuleDict({"head": made}), {name: self.reports[name]})
        made.to(head.weight.device)

    def _weights_only(self, names: list[str]) -> None:
        """Without text: every layer by itself."""
        for name in names:
            linear = get_linear(self.model, name)
            home = linear.weight.device
            linear.to(self.device)
            self._group([name], name, None, 0)
            self.model.get_submodule(name).to(home)


def _tuning_order(
    groups: list[list[str]], experts: dict[str, list[str]]
) -> list[tuple[list[str], bool]]:
    """The groups, with experts of one projection together, and whether to tune after each."""
    key_of = {name: key for key, members in experts.items() for name in members}
    together: dict[str, list[list[str]]] = {}
    for group in groups:
        together.setdefault(key_of.get(group[0], group[0]), []).append(group)
    return [(group, group is same[-1]) for same in together.values() for group in same]
