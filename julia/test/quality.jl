using Aqua, PrunableFlux, Test

Aqua.test_all(PrunableFlux)

docstrings = [name => text for (binding, doc) in Docs.meta(PrunableFlux) for (name, text) in
              ((binding.var, join(Iterators.flatten(d.text for d in values(doc.docs)))),)]

@testset "everything public is documented" begin
    @test names(PrunableFlux) ⊆ first.(docstrings)
end

"The inputs of a doctest and the text that each should show."
function examples(text)
    blocks = [m[1] for m in eachmatch(r"```jldoctest\n(.*?)```"s, text)]
    return [split(part, '\n'; limit = 2) for block in blocks for part in split(block, "julia> "; keepempty = false)]
end

@testset "examples of $name" for (name, text) in docstrings
    sandbox = Module()
    Core.eval(sandbox, :(using Flux, PrunableFlux))
    for (input, shown) in examples(text)
        value = Core.eval(sandbox, Meta.parseall(input))
        result = endswith(input, ';') || isnothing(value) ? "" : sprint(show, MIME("text/plain"), value)
        @test strip(result) == strip(shown)
    end
end
