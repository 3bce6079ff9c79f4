using Flux, PrunableFlux, Random, Test
using PrunableFlux: select

masks(model) = [copy(l.mask) for l in prunables(model)]
snapshot(model) = deepcopy(Flux.state(model))

@testset "exact counts, monotone masks, no revival: trial $trial" for trial in 1:40
    rng = Xoshiro(trial)
    model = mlp(rng, rand(rng, 1:30, rand(rng, 2:5))...)
    structure = rand(rng, (Global(), Layerwise()))
    criterion = rand(rng, (Magnitude(), RandomSaliency(seed = trial)))
    for s in sort(0.99rand(rng, 4))
        before, weights = masks(model), [copy(l.dense.weight) for l in prunables(model)]
        prune!(model, criterion; sparsity = s, structure)
        after = masks(model)
        if structure isa Global
            @test sum(count, after) == sum(length, after) - round(Int, s * sum(length, after))
        else
            @test all(m -> count(m) == length(m) - round(Int, s * length(m)), after)
        end
        @test all(((b, a),) -> all(b .>= a), zip(before, after))
        @test all(l -> all(iszero, l.dense.weight[.!l.mask]), prunables(model))
        @test all(((l, w),) -> l.dense.weight[l.mask] == w[l.mask], zip(prunables(model), weights))
        again = masks(prune!(model, criterion; sparsity = s, structure))
        @test again == after
    end
end

@testset "the lowest scores go" begin
    model = mlp(Xoshiro(1), 20, 15, 5)
    magnitudes = [abs.(l.dense.weight) for l in prunables(model)]
    prune!(model, Magnitude(); sparsity = 0.6)
    kept = vcat((s[m] for (s, m) in zip(magnitudes, masks(model)))...)
    gone = vcat((s[.!m] for (s, m) in zip(magnitudes, masks(model)))...)
    @test maximum(gone) < minimum(kept)
end

@testset "ties go by layer, output, input" begin
    model = Chain(PrunableDense(ones(Float32, 2, 3)), PrunableDense(ones(Float32, 2, 2)))
    prune!(model, Magnitude(); sparsity = 0.4)
    @test masks(model) == [Bool[0 0 0; 0 1 1], trues(2, 2)]
    prune!(model, Magnitude(); sparsity = 0.7)
    @test masks(model) == [falses(2, 3), Bool[0 1; 1 1]]
    signed = [Float32[0.0 -0.0; -0.0 0.0]]
    @test select(Global(), signed, [trues(2, 2)], 0.25) == [Bool[0 1; 1 1]]
    @test select(Global(), signed, [trues(2, 2)], 0.5) == [Bool[0 0; 1 1]]
end

@testset "one sparsity per layer" begin
    model = mlp(Xoshiro(2), 10, 10, 10)
    prune!(model, Magnitude(); sparsity = [0.2, 0.75], structure = Layerwise())
    @test count.(masks(model)) == [80, 25]
    @test sparsity(model) ≈ 0.475
    @test density(model[1]) == 0.8
end

@testset "round half to even" begin
    @test count(only(select(Global(), [rand(1, 5)], [trues(1, 5)], 0.5))) == 3
    @test count(only(select(Global(), [rand(1, 7)], [trues(1, 7)], 0.5))) == 3
end

struct Broken
    scores::Any
end
PrunableFlux.saliency(criterion::Broken, model, batch...) = criterion.scores

@testset "bad input changes nothing" begin
    model = mlp(Xoshiro(3), 6, 5, 4)
    prune!(model, Magnitude(); sparsity = 0.3)
    before = snapshot(model)
    for (criterion, sparsity, structure, error) in (
            (Magnitude(), 1.0, Global(), ArgumentError), (Magnitude(), -0.1, Global(), ArgumentError),
            (Magnitude(), NaN, Global(), ArgumentError), (Magnitude(), 0.2, Global(), ArgumentError),
            (Magnitude(), [0.5, 0.5], Global(), DimensionMismatch), (Magnitude(), [0.5], Layerwise(), DimensionMismatch),
            (Magnitude(), [0.9, 0.0], Layerwise(), ArgumentError),
            (Broken([fill(NaN, 5, 6), ones(4, 5)]), 0.5, Global(), ArgumentError),
            (Broken([ones(6, 5), ones(4, 5)]), 0.5, Global(), DimensionMismatch))
        @test_throws error prune!(model, criterion; sparsity, structure)
        @test snapshot(model) == before
    end
    @test_throws ArgumentError prune!(Chain(Dense(2 => 2)), Magnitude(); sparsity = 0.5)
end
