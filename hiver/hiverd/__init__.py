"""The Hiver server: sandboxes for untrusted code behind one HTTP port."""
