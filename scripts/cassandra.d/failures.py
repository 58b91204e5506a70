"""What can go wrong with a node of ours, and the exit status that says so."""


class NodeError(Exception):
    """A verb could not do its work; the message names the thing and the next step."""

    exit_status = 1


class ToolMissingError(NodeError):
    """Java 17 or Maven is not on this machine; the message says how to get it."""

    exit_status = 3


class PortTakenError(NodeError):
    """The node found a port of its own in use; another choice of ports may work."""
