"""The Hiver server: sandboxes for untrusted code behind one HTTP port."""

__version__ = "0.1.0"
