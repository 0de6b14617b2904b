"""Conformance suites that plug-ins must pass, ours and other people's."""
