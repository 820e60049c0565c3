"""What one config says twice and differently."""

from collections.abc import Iterator, Mapping

from stockflow.checkpoints.doubled import contradictions
from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import redact
from stockflow.text.examples import some
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown


def contradicting_configs(proposal: Proposal) -> Iterator[Remark]:
    """Yield which facts configs tell twice and differently, the published one or a model's."""
    owners = dict[str, list[str]]()
    found = dict[str, Mapping[str, object]]()
    donor = redact(proposal.donor.url)
    for each in proposal.checkpoints:
        config = proposal.config if each is proposal.donor else each.config
        for values in contradictions(config or {}):
            said = " and ".join(f"{key}: {shown(value)}" for key, value in values.items())
            found[said] = values
            owners.setdefault(said, []).append(redact(each.url))
    for said, urls in owners.items():
        which = f"the config of {urls[0]} says" if len(urls) == 1 else f"the configs of {some(urls, quote=str)} say"
        goes = f"; that of {donor} is published with both" if donor in urls else ""
        text = (
            f"{which} {said}, and versions of loaders differ in which they follow: find out which one was meant when "
            f"the weights were trained, and leave only that one there{goes}"
        )
        told = {key: shown(value) for key, value in found[said].items()}
        yield Remark("config-contradicts", text, "warning", tuple(urls), values=told)
