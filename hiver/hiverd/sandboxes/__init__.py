"""Lifecycle of sandboxes: create, adopt, apply, exec, reap, sweep."""
