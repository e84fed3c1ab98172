"""The engine of a language rank: pages, scheduler, model runner, sampler, and the loop that ties them."""
