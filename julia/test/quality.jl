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

# In a process of its own, with the means of SnoopCompileCore's `@snoop_invalidations`; the last line is one that it must see.
@testset "loading makes no code of others invalid" begin
    script = """
    using Flux
    entries = ccall(:jl_debug_method_invalidation, Any, (Cint,), 1)
    using PrunableFlux
    g(x) = 1
    f(x) = g(x[])
    f(Ref{Any}(1))
    g(::Int) = 2
    ccall(:jl_debug_method_invalidation, Any, (Cint,), 0)
    for (method, what) in zip(entries, entries[2:end])
        what == "jl_method_table_insert" && method isa Method && println(Base.moduleroot(method.module))
    end
    """
    command = `$(Base.julia_cmd()) --project=$(Base.active_project()) --startup-file=no -e $script`
    guilty = readlines(command)
    @test "Main" in guilty
    @test "PrunableFlux" ∉ guilty
end
