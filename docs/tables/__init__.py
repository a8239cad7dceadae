"""What the pages' tables hold: one module a page, `TABLES` by the name in the page's marker."""
