"""The three roles. The only place where learning meets networking."""
