"""What was changed in the norms of a model, what was left and why: filled by ``convert_norm`` and ``fold_norms``."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class NormChange:
    """A norm that became something else. ``note`` says what did not carry over."""

    name: str
    old: str
    new: str
    note: str = ""


@dataclass(frozen=True)
class NormLeft:
    """A norm that stayed as it was."""

    name: str
    kind: str
    reason: str


@dataclass
class NormReport:
    """Pass one as ``report=`` and print it.

    Attributes:
        changed, left: an entry for each norm, in the model's order, under its name in ``named_modules()``; the model
            itself is ``""``.

    Examples::

        >>> report = fbn_plugin.NormReport()
        >>> model = fbn_plugin.convert_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "FBN", report=report)
        >>> print(report)
        1 norm changed, 0 left
          1 x BatchNorm2d -> FilteredBatchNorm2d: 1
    """

    changed: list[NormChange] = field(default_factory=list)
    left: list[NormLeft] = field(default_factory=list)

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for change in self.changed:
            note = f" ({change.note})" if change.note else ""
            groups.setdefault(f"{change.old} -> {change.new}{note}", []).append(change.name)
        for left in self.left:
            groups.setdefault(f"{left.kind} left: {left.reason}", []).append(left.name)
        lines = [f"{len(self.changed)} norm{'s' * (len(self.changed) != 1)} changed, {len(self.left)} left"]
        for what, names in groups.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  {len(names)} x {what}: {', '.join(name or 'the model' for name in names[:3])}{more}")
        return "\n".join(lines)
