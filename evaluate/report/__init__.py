"""The report: `build` makes the data, `verdict` the words, `page` and `markdown` show them."""
