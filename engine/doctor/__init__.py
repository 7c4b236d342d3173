"""`plexrank doctor`: what this machine has, what is wrong with it, and the command that mends each fault."""

from engine.doctor.finding import Finding
from engine.doctor.machine import examine_machine
from engine.doctor.services import examine_services
from engine.doctor.trio import examine_trio


def examine() -> list[Finding]:
    """All findings; one that is `wrong` means that plexrank cannot work here."""
    return [*examine_trio(), *examine_machine(), *examine_services()]


__all__ = ["Finding", "examine", "examine_machine", "examine_services", "examine_trio"]
