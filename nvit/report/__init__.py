"""What runs cost and gave, as an HTML page: `read` takes what a folder holds, `sections` say it, `page` joins them."""
