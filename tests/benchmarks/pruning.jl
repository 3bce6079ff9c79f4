# How long pruning takes, best of some repeats: julia --project=julia tests/benchmarks/pruning.jl [repeats] [share of the widths]

using Flux, PrunableFlux

repeats, share = parse(Int, get(ARGS, 1, "10")), parse(Float64, get(ARGS, 2, "1"))

function seconds(widths, criterion, structure)
    network = prunable(Chain((Dense(i => o, relu) for (i, o) in zip(widths, widths[2:end]))...))
    return minimum(0:repeats) do _ # the first compiles
        fresh = deepcopy(network)
        @elapsed prune!(fresh, criterion; sparsity = 0.9, structure)
    end
end

println(first(Sys.cpu_info()).model, ", Julia ", VERSION)
wide, lenet = (2500, 2000, 2500), (784, 300, 100, 10)
for (widths, criterion, structure) in ((wide, Magnitude(), Global()), (wide, Magnitude(), Layerwise()),
                                       (wide, Magnitude(), PerOutput()), (lenet, SynFlow(), Global()))
    widths = max.(8, round.(Int, share .* widths))
    weights = sum(widths[1:(end - 1)] .* widths[2:end])
    println(nameof(typeof(criterion)), ", ", nameof(typeof(structure)), ", ", join(widths, "–"), ", ", weights, " weights: ",
            round(seconds(widths, criterion, structure); sigdigits = 2), " s")
end
