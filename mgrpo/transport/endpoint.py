"""Both ends of the link in one import."""

from mgrpo.transport.client import Answer, Client
from mgrpo.transport.codec import Refusal
from mgrpo.transport.server import Handler, Park, Reply, Request, Server

__all__ = ["Answer", "Client", "Handler", "Park", "Refusal", "Reply", "Request", "Server"]
