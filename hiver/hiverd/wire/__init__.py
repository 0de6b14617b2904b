"""The wire: request and answer bodies of both client families, and events. Pure, no I/O."""
